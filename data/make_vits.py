"""The recipe that makes small vision anchors: three ViTs of 6 blocks, 32, 64 and 128 wide, pretrained apart from each other.

    python data/make_vits.py --output DIR [--source digits|pictures] [--seed 0]

`digits` (the demo's): scikit-learn's handwritten digits, 8x8; writes `digits.npz`, half of the 1,797 pictures to train on, half held
out, and pretrains on the digits 0 to 6 of the training half. The fine-tune then meets three digits that no anchor has seen.

`pictures`: 30,000 rendered pictures of 32x32 (`pictures.py`), for real 32x32 tasks that no anchor has seen.

Both write `anchors/tiny`, `small` and `base`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

WIDTHS = {"tiny": 32, "small": 64, "base": 128}
BATCH, RATE = 64, 1e-3
KNOWN = 7  # digits that pretraining sees


@dataclass(frozen=True)
class Source:
    """Pictures to pretrain on, uint8 [images, height, width(, channels)], and to judge by; how they are cut and for how long."""

    pictures: np.ndarray
    labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray
    names: list[str]
    patch: int
    steps: int
    muon: bool = False  # on the matrices inside the blocks


def digits(seed: int) -> dict[str, np.ndarray]:
    """Both halves: pictures [images, 8, 8] of uint8 and their digits, shuffled by `seed`."""
    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    pictures, labels = (bunch.images[order] * 15).astype(np.uint8), bunch.target[order].astype(np.int64)
    half = len(order) // 2
    return {
        "x_train": pictures[:half], "y_train": labels[:half], "x_test": pictures[half:], "y_test": labels[half:],
        "class_names": np.array([str(digit) for digit in range(10)]),
    }  # fmt: skip


def digits_source(arrays: dict[str, np.ndarray]) -> Source:
    """The known digits of both halves."""
    known = {part: arrays[f"y_{part}"] < KNOWN for part in ("train", "test")}
    parts = [arrays[f"{axis}_{part}"][known[part]] for part in ("train", "test") for axis in "xy"]
    return Source(*parts, names=[str(digit) for digit in range(KNOWN)], patch=2, steps=600)


def pictures_source(seed: int) -> Source:
    import pictures

    return Source(
        *pictures.render(30_000, seed),
        *pictures.render(2_000, seed + 10_000),
        pictures.NAMES,
        patch=4,
        steps=2_000,
        muon=True,
    )


def vit(
    width: int, side: int = 8, patch: int = 2, names: Sequence[str] = tuple("0123456")
) -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=6, num_attention_heads=width // 16,
            image_size=side, patch_size=patch, id2label=dict(enumerate(names)),
        )
    )  # fmt: skip


def to_pixels(pictures: np.ndarray) -> Tensor:
    """[images, 3, height, width] in -1..1, as the processor gives them."""
    pixels = torch.tensor(pictures).float() / 127.5 - 1
    return pixels[:, None].repeat(1, 3, 1, 1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)


def shifted(pixels: Tensor) -> Tensor:
    """Every picture [images, channels, height, width] moved by up to one pixel each way."""
    side = pixels.shape[-1]
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=-1.0)
    down, right = torch.randint(3, (2,)).tolist()
    return padded[:, :, down : down + side, right : right + side]


def pretrain(name: str, source: Source, seed: int) -> ViTForImageClassification:
    """A ViT that tells the source's classes apart."""
    torch.manual_seed(seed)
    model = vit(WIDTHS[name], source.pictures.shape[1], source.patch, source.names).train()
    inner = [p for p in model.vit.layers.parameters() if p.ndim == 2] if source.muon else []
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in inner)]
    optimizers = [torch.optim.AdamW(rest, lr=RATE, weight_decay=0.05)]
    optimizers += [torch.optim.Muon(inner, lr=0.01, weight_decay=0.01)] if inner else []
    steps, labels = source.steps, torch.tensor(source.labels)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        for optimizer in optimizers
    ]
    bar = tqdm(range(steps), desc=name)
    for step in bar:
        chosen = torch.randint(len(labels), (BATCH,))
        loss = model(pixel_values=shifted(to_pixels(source.pictures[chosen.numpy()])), labels=labels[chosen]).loss
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make small vision anchors, and the demo's data.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--source", choices=("digits", "pictures"), default="digits")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.source == "digits":
        arrays = digits(arguments.seed)
        np.savez_compressed(arguments.output / "digits.npz", **arrays)
        source = digits_source(arrays)
    else:
        source = pictures_source(arguments.seed)
    side = source.pictures.shape[1]
    processor = ViTImageProcessor(size={"height": side, "width": side})
    report = {}
    for number, name in enumerate(WIDTHS):
        start = time.monotonic()
        model = pretrain(name, source, arguments.seed + number)
        with torch.no_grad():
            found = torch.cat(
                [model(pixel_values=to_pixels(part)).logits.argmax(-1) for part in np.array_split(source.held_out, 8)]
            )
        report[name] = {
            "parameters": model.num_parameters(),
            "accuracy_on_known_classes": round(float((found.numpy() == source.held_out_labels).mean()), 4),
            "seconds": round(time.monotonic() - start),
        }
        model.save_pretrained(arguments.output / "anchors" / name)
        processor.save_pretrained(arguments.output / "anchors" / name)
    (arguments.output / "anchors.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
