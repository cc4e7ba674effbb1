"""Preprocessed images: pixel values and labels, with augmentation by epoch, and their batches."""

import hashlib
import json
import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback

from .images import Images

_MODES = {1: "L", 3: "RGB"}


class ImageSet(Dataset):
    """Preprocessed images: the processor's pixel values [channels, height, width] and a label.

    Args:
        processor: an image processor of Transformers; it resizes and normalises.
        augment: random crop (after padding an eighth of the side) and horizontal flip (ESTA appendix A, for FGVC and CIFAR; none
            for VTAB-1k). A pure function of seed, epoch and index, so that a resumed run gets the same images.
        seed: of the augmentation.
        keep_bytes: images are preprocessed once and stored if they take no more than this, else at every access.
        channels: that the anchors take: 3, or 1 for grey images.

    Raises:
        ValueError: another number of channels.
    """

    def __init__(
        self,
        images: Images,
        processor: Any,
        augment: bool = False,
        seed: int = 0,
        keep_bytes: int = 2 * 2**30,
        channels: int = 3,
    ):
        if channels not in _MODES:
            raise ValueError(
                f"the anchors take images of {channels} channels: 1 (grey) or 3 (RGB) can be made of pictures"
            )
        self._mode = _MODES[channels]
        self.labels, self.augment, self.seed = list(images.labels), augment, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared with persistent workers
        self._images, self._processor = images.pictures, processor
        self.pixels = None
        first = self._prepared(0)
        if len(self.labels) * first.nbytes <= keep_bytes:
            self.pixels = first.new_empty(len(self.labels), *first.shape)  # [images, channels, height, width]
            for index in range(len(self.labels)):
                self.pixels[index] = self._prepared(index)

    @property
    def epoch(self) -> int:
        """The epoch of the augmentation; set by `EpochOfAugmentation`, as only some of Accelerate's loaders set it."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def _prepared(self, index: int) -> Tensor:
        image = self._images[index].convert(self._mode)
        return self._processor(image, return_tensors="pt")["pixel_values"][0]

    def pixel_values(self, index: int) -> Tensor:
        """[channels, height, width], not augmented."""
        return self._prepared(index) if self.pixels is None else self.pixels[index]

    @cached_property
    def digest(self) -> str:
        """Digest of all labels and sixteen preprocessed images, compared when a run is resumed."""
        found = hashlib.sha256(json.dumps(self.labels).encode())
        for index in sorted({len(self) * part // 16 for part in range(16)}):
            found.update(self.pixel_values(index).numpy().tobytes())
        return found.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.pixel_values(index)
        if self.augment:
            pixels = _augmented(pixels, random.Random(f"{self.seed}/{self.epoch}/{index}"))
        return {"pixel_values": pixels, "labels": self.labels[index]}


class EpochOfAugmentation(TrainerCallback):
    """Sets the epoch of an `ImageSet`, also after a resume. `StitchImageTrainer` adds it; a plain `Trainer` needs it as a callback."""

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
