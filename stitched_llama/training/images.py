"""Labelled images from arrays, folders and data sets; few-shot sampling."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from stitched_llama.space import first_line

from .image_files import (
    as_array,
    as_rgb,
    channels_last,
    check_header,
    classes_of,
    from_array,
    is_image_name,
    is_junk,
    open_image,
    read_arrays,
)
from .rows import drawn
from .tables import is_table, load_table

# Tasks of VTAB-1k and FGVC (ESTA section 5.1) that the Hub has as labelled images: name -> (Hub id, configuration).
# VTAB-1k takes 1,000 training images of each. Not in this table: Retinopathy, DMLab, KITTI, the variants of CLEVR, dSprites and
# smallNORB, and NABirds; for these `--data` takes a folder or a Hub id.
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
    """Pillow images in RGB with class numbers, and the class names; images from `read_images` are opened on access."""

    pictures: Sequence[Any]
    labels: Sequence[int]
    names: Sequence[str]


class _LazyImages(Sequence):
    """`load(source)` of each source, called at every access."""

    def __init__(self, load: Callable[[Any], Any], sources: Sequence[Any]):
        self.load, self.sources = load, sources

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Any:
        return self.load(self.sources[index])


def read_images(source: str, split: str = "train", names: Sequence[str] | None = None) -> Images:
    """Labelled images from a `.npz` file, an image folder, a task of `IMAGE_TASKS`, a Hub data set or a local copy of one.

    A `.npz` holds `x_{split}` of uint8, [images, height, width] or with channels last or first; `y_{split}`, the number or name of a
    class for each image, or one-hot; and optionally `class_names`. A folder holds `{split}/{class}/image`, or `{class}/image`:
    then `"test"` is every fifth image of a class by name, `"train"` the rest. Images are rotated upright by EXIF and converted to
    8 bits.

    Args:
        split: `"train"` or `"test"`, or the name of a split of the data set; `"train+val"` concatenates two.
        names: of the classes, from the training split.

    Raises:
        ValueError: the source cannot be read or is empty, an image cannot be opened, a label is not one class or outside the
            classes, or splits have different class names.
    """
    path = Path(source)
    if "+" in split:
        names = names or _names_of_all(path, split.split("+"))
        parts = [read_images(source, part, names) for part in split.split("+")]
        names = max((part.names for part in parts), key=len)
        if other := next((part for part in parts if part.names != names[: len(part.names)]), None):
            raise ValueError(
                f"the parts {split!r} of {source} name their classes {other.names} and {names}: they must agree"
            )
        labels = [label for part in parts for label in part.labels]
        return Images(ConcatDataset([part.pictures for part in parts]), labels, names)
    if path.suffix == ".npz":
        found = _from_npz(path, split, names)
    elif path.is_dir() and not is_table(path):
        found = _from_folder(path, split, names)
    else:
        name, config = IMAGE_TASKS.get(source, (source, None))
        try:
            table = load_table(name, config, split)
        except ValueError as error:
            raise ValueError(
                f"{name!r} is neither a .npz, a folder, one of {', '.join(IMAGE_TASKS)}, nor a data set of the Hub in reach: {error}"
            ) from error
        found = _from_table(table, f"{name}, {split}", names)
    if not len(found.labels):
        raise ValueError(f"{source} holds no pictures in its part {split!r}")
    names = list(names or found.names)
    wrong = next(((i, label) for i, label in enumerate(found.labels) if not 0 <= label < len(names)), None)
    if wrong:
        raise ValueError(f"{source}, {split} picture {wrong[0]}: label {wrong[1]} is outside the {len(names)} classes")
    return Images(found.pictures, found.labels, names)


def _names_of_all(path: Path, splits: Sequence[str]) -> list[str] | None:
    """The class names of all splits together, as one split may lack some; None where labels are numbers."""
    if path.is_dir() and not is_table(path):
        return sorted({name for part in splits for name in _classes(path, part)})
    if path.suffix != ".npz" or "class_names" in read_arrays(path, (), ("class_names",)):
        return None
    labels = [read_arrays(path, (f"y_{part}",))[f"y_{part}"] for part in splits]
    texts = [classes_of(part, None, str(path))[1] for part in labels if part.dtype.kind in "US"]
    return sorted({name for part in texts for name in part}) if texts else None


def _from_npz(path: Path, split: str, names: Sequence[str] | None) -> Images:
    arrays = read_arrays(path, (f"x_{split}", f"y_{split}"), ("class_names",))
    pixels, where = arrays[f"x_{split}"], f"{path}, x_{split}"
    if pixels.dtype != np.uint8 or len(pixels) != len(arrays[f"y_{split}"]):
        raise ValueError(
            f"{where} is {pixels.dtype} {list(pixels.shape)} and y_{split} has {len(arrays[f'y_{split}'])} labels; as many uint8 "
            "pictures as labels are needed"
        )
    own = [str(name) for name in arrays["class_names"]] if "class_names" in arrays else None
    labels, names = classes_of(arrays[f"y_{split}"], _agreed(own, names, str(path)), f"{path}, y_{split}")
    return Images(_LazyImages(from_array, channels_last(pixels, where)), labels, names)


def _agreed(own: Sequence[str] | None, names: Sequence[str] | None, where: str) -> Sequence[str] | None:
    """The class names of the training split if given, which those of the source must not contradict; else those of the source."""
    if own and names:
        if other := next(((i, a, b) for i, (a, b) in enumerate(zip(own, names)) if a != b), None):
            raise ValueError(
                f"{where} calls class {other[0]} {other[1]!r}, the other part {other[2]!r}: they must agree"
            )
    return names or own


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not is_junk(entry))


def _root(path: Path, split: str) -> tuple[Path, bool]:
    """The folder that holds a split's class folders, and whether all splits share it."""
    folders = [folder for folder in _entries(path) if folder.is_dir()]
    parts = [folder.name for folder in folders if any(inner.is_dir() for inner in _entries(folder))]
    if (path / split).is_dir():
        return path / split, False
    if parts or split not in ("train", "test"):
        raise ValueError(f"{path} has no folder {split!r}: it holds {', '.join(parts or [f.name for f in folders])}")
    return path, True


def _classes(path: Path, split: str) -> list[str]:
    entries = _entries(_root(path, split)[0])
    if stray := next((entry for entry in entries if entry.is_file() and is_image_name(entry)), None):
        raise ValueError(f"{stray} lies beside the folders of classes and has none: move it into one, or remove it")
    folders = [folder for folder in entries if folder.is_dir()]
    if empty := next((folder for folder in folders if not _entries(folder)), None):
        raise ValueError(f"{empty} would be a class and holds no pictures: remove it, or fill it")
    return [folder.name for folder in folders]


def _from_folder(path: Path, split: str, names: Sequence[str] | None) -> Images:
    (root, shared), classes = _root(path, split), _classes(path, split)
    if unknown := sorted(set(classes) - set(names or classes)):
        raise ValueError(f"{root / unknown[0]} is none of the classes {', '.join(names or [])} of the other part")
    found, labels = [], []
    classes = list(names or classes)
    for label, name in enumerate(classes):
        files = _entries(root / name) if (root / name).is_dir() else []
        if shared:
            files = [file for number, file in enumerate(files) if (number % 5 == 4) == (split == "test")]
        for file in files:
            check_header(file)
        found += files
        labels += [label] * len(files)
    return Images(_LazyImages(open_image, found), labels, classes)


def _from_table(table: Any, where: str, names: Sequence[str] | None) -> Images:
    """Images of a `datasets.Dataset`, opened on access."""
    image = next((name for name in _IMAGE_NAMES if name in table.column_names), None)
    label = next((name for name in _LABEL_NAMES if name in table.column_names), None)
    if image is None or label is None:
        raise ValueError(f"{where} has the columns {table.column_names}: an image and a label are needed")
    own = getattr(table.features[label], "names", None)
    labels, names = classes_of(as_array(table[label]), _agreed(own, names, where), f"{where}, {label}")
    return Images(_LazyImages(partial(_from_row, table, image, where), range(len(table))), labels, names)


def _from_row(table: Any, column: str, where: str, index: int) -> Any:
    try:
        image = table[index][column]
        if image is None:
            raise ValueError("there is none")
        return as_rgb(image)
    except Exception as error:
        raise ValueError(f"the picture of {where}, row {index} cannot be opened: {first_line(error)}") from error


def _chosen(images: Images, indices: Sequence[int]) -> Images:
    return Images(Subset(images.pictures, indices), [images.labels[index] for index in indices], images.names)


def some_of(images: Images, size: int, seed: int) -> Images:
    """`size` images sampled at random by `seed`; all if `size` is 0."""
    return _chosen(images, drawn(len(images.labels), size, seed))


def few_shot(images: Images, shots: int, seed: int) -> Images:
    """`shots` images of each class, sampled at random by `seed`.

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
