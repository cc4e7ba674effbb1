"""The recipe that makes small vision anchors: three ViTs of 6 blocks, 32, 64 and 128 wide, pretrained apart from each other.

    python data/make_vits.py --output DIR [--source digits|pictures] [--family vit|convnext|resnet-swin] [--seed 0]

`digits` (the demo's): scikit-learn's handwritten digits, 8x8; writes `digits.npz`, half of the 1,797 pictures to train on, half held
out, and pretrains on the digits 0 to 6 of the training half. The fine-tune then meets three digits that no anchor has seen.

`pictures`: 30,000 rendered pictures of 32x32 (`pictures.py`), for real 32x32 tasks that no anchor has seen.

Both write `anchors/tiny`, `small` and `base`. Of the other families two are made, `small` and `base`, and pictures are enlarged
to 16 (ConvNeXt) or 32 pixels (ResNet and Swin).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

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


def convnext(width: int, depths: list[int], names: Sequence[str]) -> ConvNextForImageClassification:
    """Maps of 8x8 and 4x4."""
    shape = {"hidden_sizes": [width, 2 * width], "depths": depths, "num_stages": 2, "layer_scale_init_value": 0.1}
    return ConvNextForImageClassification(
        ConvNextConfig(image_size=16, patch_size=2, id2label=dict(enumerate(names)), **shape)
    )


def resnet(names: Sequence[str]) -> ResNetForImageClassification:
    """Maps of 8x8, 4x4 and 2x2."""
    shape = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [2, 2, 2], "layer_type": "basic"}
    config = ResNetConfig(id2label=dict(enumerate(names)), **shape)
    config.image_size = 32
    return ResNetForImageClassification(config)


def swin(names: Sequence[str]) -> SwinForImageClassification:
    """Maps of 8x8, 4x4 and 2x2."""
    shape = {"embed_dim": 24, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 2, "drop_path_rate": 0.0}
    return SwinForImageClassification(SwinConfig(image_size=32, patch_size=4, id2label=dict(enumerate(names)), **shape))


# family -> side of its pictures (None: the source's own), and what makes each anchor from a source
FAMILIES: dict[str, tuple[int | None, dict[str, Callable[[Source], PreTrainedModel]]]] = {
    "vit": (
        None,
        {
            name: lambda s, width=width: vit(width, s.pictures.shape[1], s.patch, s.names)
            for name, width in (("tiny", 32), ("small", 64), ("base", 128))
        },
    ),
    "convnext": (
        16,
        {"small": lambda s: convnext(16, [2, 2], s.names), "base": lambda s: convnext(32, [3, 4], s.names)},
    ),
    "resnet-swin": (32, {"small": lambda s: resnet(s.names), "base": lambda s: swin(s.names)}),
}


def to_pixels(pictures: np.ndarray, side: int | None = None) -> Tensor:
    """[images, 3, height, width] in -1..1, as the processor gives them; enlarged to `side`, about as it does."""
    pixels = torch.tensor(pictures).float() / 127.5 - 1
    pixels = pixels[:, None].repeat(1, 3, 1, 1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return pixels if side is None else torch.nn.functional.interpolate(pixels, (side, side), mode="bilinear")


def shifted(pixels: Tensor) -> Tensor:
    """Every picture [images, channels, height, width] moved by up to one pixel each way."""
    side = pixels.shape[-1]
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=-1.0)
    down, right = torch.randint(3, (2,)).tolist()
    return padded[:, :, down : down + side, right : right + side]


def pretrain(name: str, family: str, source: Source, seed: int) -> PreTrainedModel:
    """A model that tells the source's classes apart."""
    torch.manual_seed(seed)
    side, makers = FAMILIES[family]
    model = makers[name](source).train()
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
        loss = model(pixel_values=shifted(to_pixels(source.pictures[chosen.numpy()], side)), labels=labels[chosen]).loss
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
    parser.add_argument("--family", choices=FAMILIES, default="vit")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.family != "vit" and arguments.source != "digits":
        parser.error(f"pictures are for ViTs here, not {arguments.family}: leave --source out")
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.source == "digits":
        arrays = digits(arguments.seed)
        np.savez_compressed(arguments.output / "digits.npz", **arrays)
        source = digits_source(arrays)
    else:
        source = pictures_source(arguments.seed)
    enlarged, makers = FAMILIES[arguments.family]
    side = enlarged or source.pictures.shape[1]
    processor = ViTImageProcessor(size={"height": side, "width": side})
    report = {}
    for number, name in enumerate(makers):
        start = time.monotonic()
        model = pretrain(name, arguments.family, source, arguments.seed + number)
        with torch.no_grad():
            found = torch.cat(
                [
                    model(pixel_values=to_pixels(part, enlarged)).logits.argmax(-1)
                    for part in np.array_split(source.held_out, 8)
                ]
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
