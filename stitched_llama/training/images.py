"""Labelled images: read, check, draw a few of each class, prepare, batch."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import TrainerCallback

from .rows import drawn

# Tasks of VTAB-1k and FGVC (ESTA section 5.1) that the Hub holds as pictures with labels: name -> (Hub id, configuration).
# VTAB-1k takes 1,000 training pictures of each. Not in this table: Retinopathy, DMLab, KITTI, the variants of CLEVR, dSprites and
# smallNORB, and NABirds; `--data` takes a folder or a Hub id for these.
IMAGE_TASKS = {
    "cifar100": ("uoft-cs/cifar100", None),
    "caltech101": ("dpdl-benchmark/caltech101", None),
    "dtd": ("tanganke/dtd", None),
    "oxford_flowers": ("dpdl-benchmark/oxford_flowers102", None),
    "oxford_pets": ("timm/oxford-iiit-pet", None),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits"),
    "sun397": ("tanganke/sun397", None),
    "patch_camelyon": ("dpdl-benchmark/patch_camelyon", None),
    "eurosat": ("tanganke/eurosat", None),
    "resisc45": ("tanganke/resisc45", None),
    "stanford_cars": ("tanganke/stanford_cars", None),
    "cub_200_2011": ("bentrevett/caltech-ucsd-birds-200-2011", None),
    "stanford_dogs": ("maurice-fp/stanford-dogs", None),
}
_IMAGE_NAMES = ("image", "img", "pixel_values")
_LABEL_NAMES = ("label", "fine_label", "labels")


@dataclass(frozen=True)
class Images:
    """Pictures (of Pillow, RGB) with classes, and the classes' names; `read_images` gives pictures that are opened when asked for."""

    pictures: Sequence[Any]
    labels: Sequence[int]
    names: Sequence[str]


class _Pictures(Sequence):
    """`opened(place)` of each place, at every visit anew."""

    def __init__(self, opened: Callable[[Any], Any], places: Sequence[Any]):
        self.opened, self.places = opened, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.opened(self.places[index])


def read_images(source: str, split: str = "train", names: Sequence[str] | None = None) -> Images:
    """Labelled pictures of a `.npz` file, an image folder, a task of `IMAGE_TASKS` or a Hub data set.

    A `.npz` holds `x_{split}` [images, height, width(, channels)] of uint8, `y_{split}` [images] and optionally `class_names`.
    A folder holds `{split}/{class}/picture`, or `{class}/picture`: then `"test"` is every fifth of a class by name, `"train"` the rest.

    Args:
        split: `"train"` or `"test"`, or what the data set calls it; `"train+val"` joins two parts.
        names: of the classes, where a training part has named them.

    Raises:
        ValueError: the source cannot be read or is empty, a picture cannot be opened, a label is outside the classes, or parts
            name their classes otherwise.
    """
    path = Path(source)
    if "+" in split:
        if names is None and path.is_dir():
            names = sorted({name for part in split.split("+") for name in _classes(path, part)})
        parts = [read_images(source, part, names) for part in split.split("+")]
        names = max((part.names for part in parts), key=len)
        if other := next((part for part in parts if part.names != names[: len(part.names)]), None):
            raise ValueError(
                f"the parts {split!r} of {source} name their classes {other.names} and {names}: they must agree"
            )
        labels = [label for part in parts for label in part.labels]
        return Images(ConcatDataset([part.pictures for part in parts]), labels, names)
    if path.suffix == ".npz":
        found = _from_npz(path, split)
    elif path.is_dir():
        found = _from_folder(path, split, names)
    else:
        found = _from_hub(*IMAGE_TASKS.get(source, (source, None)), split)
    if not len(found.labels):
        raise ValueError(f"{source} holds no pictures in its part {split!r}")
    names = list(names or found.names)
    wrong = next(((i, label) for i, label in enumerate(found.labels) if not 0 <= label < len(names)), None)
    if wrong:
        raise ValueError(f"{source}, {split} picture {wrong[0]}: label {wrong[1]} is outside the {len(names)} classes")
    return Images(found.pictures, [int(label) for label in found.labels], names)


def _from_npz(path: Path, split: str) -> Images:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with np.load(path, allow_pickle=False) as arrays:
        if f"x_{split}" not in arrays or f"y_{split}" not in arrays:
            raise ValueError(f"{path} has no x_{split} and y_{split}: it holds {', '.join(arrays.files)}")
        pixels, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
        names = [str(name) for name in arrays["class_names"]] if "class_names" in arrays else None
    if pixels.dtype != np.uint8 or len(pixels) != len(labels):
        raise ValueError(
            f"{path}: x_{split} is {pixels.dtype} {list(pixels.shape)} and y_{split} has {len(labels)} labels; as many uint8 "
            "pictures as labels are needed"
        )
    names = names or [str(number) for number in range(int(labels.max()) + 1 if len(labels) else 0)]
    return Images(_Pictures(_from_array, pixels), labels.tolist(), names)


def _from_array(pixels: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(pixels).convert("RGB")


def _root(path: Path, split: str) -> tuple[Path, bool]:
    """Where a part's class folders lie, and whether the parts of an image folder share them."""
    folders = [folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    parts = sorted(folder.name for folder in folders if any(inner.is_dir() for inner in folder.iterdir()))
    if (path / split).is_dir():
        return path / split, False
    if parts or split not in ("train", "test"):
        raise ValueError(
            f"{path} has no folder {split!r}: it holds {', '.join(parts or sorted(f.name for f in folders))}"
        )
    return path, True


def _classes(path: Path, split: str) -> list[str]:
    folders = [f for f in _root(path, split)[0].iterdir() if f.is_dir() and not f.name.startswith(".")]
    if empty := next((f for f in sorted(folders) if not any(f.iterdir())), None):
        raise ValueError(f"{empty} would be a class and holds no pictures: remove it, or fill it")
    return sorted(folder.name for folder in folders)


def _from_folder(path: Path, split: str, names: Sequence[str] | None) -> Images:
    (root, shared), classes = _root(path, split), _classes(path, split)
    if unknown := sorted(set(classes) - set(names or classes)):
        raise ValueError(f"{root / unknown[0]} is none of the classes {', '.join(names or [])} of the other part")
    found, labels = [], []
    classes = list(names or classes)
    for label, name in enumerate(classes):
        files = sorted((root / name).glob("[!.]*")) if (root / name).is_dir() else []
        if shared:
            files = [file for number, file in enumerate(files) if (number % 5 == 4) == (split == "test")]
        for file in files:
            _from_file(file, header=True)
        found += files
        labels += [label] * len(files)
    return Images(_Pictures(_from_file, found), labels, classes)


def _from_file(file: Path, header: bool = False) -> Any:
    """The picture; or only whether its header is that of one."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return None if header else picture.convert("RGB")
    except OSError as error:
        raise ValueError(f"{file} is no picture that can be opened: {error}") from None


def _from_hub(name: str, config: str | None, split: str) -> Images:
    from datasets import load_dataset

    try:
        table = load_dataset(name, config, split=split)
    except Exception as error:  # each back end has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name!r} is neither a .npz, a folder, one of {', '.join(IMAGE_TASKS)}, nor a data set of the Hub in reach: {reason}"
        ) from error
    image = next((name for name in _IMAGE_NAMES if name in table.column_names), None)
    label = next((name for name in _LABEL_NAMES if name in table.column_names), None)
    if image is None or label is None:
        raise ValueError(f"{name} has the columns {table.column_names}: an image and a label are needed")
    labels = list(table[label])
    names = getattr(table.features[label], "names", None) or [str(i) for i in range(max(labels) + 1)]
    return Images(_Pictures(partial(_from_row, image), table), labels, names)


def _from_row(column: str, row: dict[str, Any]) -> Any:
    return row[column].convert("RGB")


def _chosen(images: Images, indices: Sequence[int]) -> Images:
    return Images(Subset(images.pictures, indices), [images.labels[index] for index in indices], images.names)


def some_of(images: Images, size: int, seed: int) -> Images:
    """`size` pictures drawn by `seed`, whatever order they come in; all for 0."""
    return _chosen(images, drawn(len(images.labels), size, seed))


def few_shot(images: Images, shots: int, seed: int) -> Images:
    """`shots` pictures of each class, drawn by `seed`.

    Raises:
        ValueError: a class has fewer.
    """
    rng, chosen = random.Random(seed), []
    for label, name in enumerate(images.names):
        own = [index for index, found in enumerate(images.labels) if found == label]
        if len(own) < shots:
            raise ValueError(f"class {name!r} has {len(own)} pictures, {shots} shots are asked for: ask for fewer")
        chosen += rng.sample(own, shots)
    return _chosen(images, chosen)


class ImageSet(Dataset):
    """Prepared pictures: the processor's pixel values [channels, height, width] and a label.

    Args:
        processor: an image processor of Transformers; it resizes and normalises.
        augment: random crop (after padding an eighth of the side) and horizontal flip, others in each epoch (ESTA appendix A,
            for FGVC and CIFAR; VTAB-1k takes none). A pure function of seed, epoch and picture, so that a resumed run sees
            the same.
        seed: of the augmentation.
        keep_bytes: pictures are prepared once and kept where they take no more than this, else at every visit.
    """

    def __init__(
        self, images: Images, processor: Any, augment: bool = False, seed: int = 0, keep_bytes: int = 2 * 2**30
    ):
        self.labels, self.augment, self.seed = list(images.labels), augment, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that outlive an epoch see it too
        self._pictures, self._processor = images.pictures, processor
        self.pixels = None
        first = self._prepared(0)
        if len(self.labels) * first.nbytes <= keep_bytes:
            self.pixels = first.new_empty(len(self.labels), *first.shape)  # [images, channels, height, width]
            for index in range(len(self.labels)):
                self.pixels[index] = self._prepared(index)

    @property
    def epoch(self) -> int:
        """Of the augmentation; `EpochOfAugmentation` tells it, as Accelerate's loaders do so in some of their forms only."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def _prepared(self, index: int) -> Tensor:
        return self._processor(self._pictures[index], return_tensors="pt")["pixel_values"][0]

    def picture(self, index: int) -> Tensor:
        """[channels, height, width], not augmented."""
        return self._prepared(index) if self.pixels is None else self.pixels[index]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.picture(index)
        if self.augment:
            pixels = _augmented(pixels, random.Random(f"{self.seed}/{self.epoch}/{index}"))
        return {"pixel_values": pixels, "labels": self.labels[index]}


class EpochOfAugmentation(TrainerCallback):
    """Tells an `ImageSet` which epoch begins, or goes on after a resume; `StitchImageTrainer` has it, a plain `Trainer` needs it."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        images = getattr(train_dataloader, "dataset", None)
        if isinstance(images, ImageSet):
            images.epoch = int(state.epoch + 1e-6)


def _augmented(pixels: Tensor, rng: random.Random) -> Tensor:
    """One random crop and flip of [channels, height, width]."""
    height, width = pixels.shape[1:]
    margin = max(1, height // 8)
    padded = torch.nn.functional.pad(pixels, (margin,) * 4, mode="reflect")
    top, left = rng.randint(0, 2 * margin), rng.randint(0, 2 * margin)
    cropped = padded[:, top : top + height, left : left + width]
    return cropped.flip(2) if rng.random() < 0.5 else cropped


def collate_images(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """pixel_values [batch, channels, height, width], labels [batch]."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
