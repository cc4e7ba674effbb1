"""Swin, as Transformers builds it.

Shapes: hidden [batch, height * width, width of the stage].
"""

import math
from typing import Any

from torch import Tensor, nn

from .image import ImageFamily


def _grid(block: nn.Module, hidden: Tensor) -> tuple[int, int]:
    """(height, width) of hidden [batch, positions, width]: the block's own, or a multiple where a route did not downsample."""
    height, width = block.input_resolution
    times = math.isqrt(hidden.shape[1] // (height * width))
    return height * times, width * times


class SwinFamily(ImageFamily):
    """`SwinForImageClassification`: windows in stages, patches merged between them."""

    layout = "tokens"

    def stages(self, anchor: nn.Module) -> list[tuple[str, nn.Module]]:
        layers = anchor.swin.encoder.layers
        return [(f"swin.encoder.layers.{stage}.blocks", layer.blocks) for stage, layer in enumerate(layers)]

    def adapted(self, block: nn.Module) -> nn.Module:
        return block.attention

    def embed(self, anchor: nn.Module, inputs: Tensor) -> Tensor:
        return anchor.swin.embeddings(inputs)[0]

    def between(self, anchor: nn.Module, stage: int, hidden: Tensor) -> Tensor:
        before = anchor.swin.encoder.layers[stage - 1]
        return before.downsample(hidden, _grid(before.blocks[-1], hidden))

    def step(self, block: nn.Module, hidden: Tensor, **extra: Any) -> Tensor:
        block.set_shift_and_window_size(block.input_resolution)  # once for all, whichever map comes first
        return block(hidden, _grid(block, hidden), **extra)[0]

    def head(self, anchor: nn.Module, hidden: Tensor) -> Tensor:
        pooled = anchor.swin.pooler(anchor.swin.layernorm(hidden).transpose(1, 2))
        return self.classify(anchor, pooled.flatten(1))
