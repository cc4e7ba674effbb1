"""The recipe that makes the vision demo's anchors and data: three small ViTs and scikit-learn's handwritten digits.

    python data/make_vits.py --output DIR [--seed 0]

writes `digits.npz` (half of the 1,797 pictures to train on, half held out) and `anchors/tiny`, `small`, `base`: ViTs of 6 blocks,
32, 64 and 128 wide, pretrained apart from each other on the digits 0 to 6 of the training half. The fine-tune then meets
three digits that no anchor has seen.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

WIDTHS = {"tiny": 32, "small": 64, "base": 128}
STEPS = {"tiny": 600, "small": 600, "base": 600}
KNOWN = 7  # digits that pretraining sees
SIDE, BATCH, RATE = 8, 64, 1e-3


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


def vit(width: int) -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=6, num_attention_heads=width // 16,
            image_size=SIDE, patch_size=2, id2label={digit: str(digit) for digit in range(KNOWN)},
        )
    )  # fmt: skip


def shifted(pixels: Tensor) -> Tensor:
    """Every picture [images, channels, height, width] moved by up to one pixel each way."""
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=-1.0)
    down, right = torch.randint(3, (2,)).tolist()
    return padded[:, :, down : down + SIDE, right : right + SIDE]


def pretrain(name: str, pixels: Tensor, labels: Tensor, seed: int) -> ViTForImageClassification:
    """A ViT that tells the known digits apart: pixels [images, 3, 8, 8], labels [images]."""
    torch.manual_seed(seed)
    model = vit(WIDTHS[name]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    steps = STEPS[name]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    bar = tqdm(range(steps), desc=name)
    for step in bar:
        chosen = torch.randint(len(labels), (BATCH,))
        loss = model(pixel_values=shifted(pixels[chosen]), labels=labels[chosen]).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the vision demo's anchors and data.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arrays = digits(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.output / "digits.npz", **arrays)

    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    pixels = {
        part: torch.tensor(arrays[f"x_{part}"]).float()[:, None].repeat(1, 3, 1, 1) / 127.5 - 1
        for part in ("train", "test")
    }
    labels = {part: torch.tensor(arrays[f"y_{part}"]) for part in ("train", "test")}
    known = {part: labels[part] < KNOWN for part in labels}
    report = {}
    for number, name in enumerate(WIDTHS):
        start = time.monotonic()
        seed = arguments.seed + number
        model = pretrain(name, pixels["train"][known["train"]], labels["train"][known["train"]], seed)
        with torch.no_grad():
            found = model(pixel_values=pixels["test"][known["test"]]).logits.argmax(-1)
        report[name] = {
            "parameters": model.num_parameters(),
            "accuracy_on_known_digits": round(float((found == labels["test"][known["test"]]).float().mean()), 4),
            "seconds": round(time.monotonic() - start),
        }
        model.save_pretrained(arguments.output / "anchors" / name)
        processor.save_pretrained(arguments.output / "anchors" / name)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
