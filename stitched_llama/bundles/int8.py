"""Stitching layers in 8 bits: half of their bfloat16 bytes, for bundles of large anchors.

Each row has a scale that is a power of two, so the numbers read back are exact in bfloat16 and saving them again gives
the same bytes. The error is at most 1/127 of a row's largest weight.
"""

import torch
from torch import Tensor


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weight [rows, columns] and float32 scale [rows]."""
    weight = weight.float()
    largest = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny * 256)
    scale = torch.exp2(torch.ceil(torch.log2(largest / 127)))
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantize_rows(weight: Tensor, scale: Tensor) -> Tensor:
    """float32 weight [rows, columns]."""
    return weight.float() * scale[:, None]
