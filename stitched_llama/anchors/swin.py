"""Swin, as Transformers builds it.

Shapes: hidden [batch, height * width, width of the stage].
"""

from typing import Any

from torch import Tensor, nn

from .image import ImageFamily


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
        return before.downsample(hidden, before.blocks[-1].input_resolution)

    def step(self, block: nn.Module, hidden: Tensor, **extra: Any) -> Tensor:
        return block(hidden, block.input_resolution, **extra)[0]

    def head(self, anchor: nn.Module, hidden: Tensor) -> Tensor:
        pooled = anchor.swin.pooler(anchor.swin.layernorm(hidden).transpose(1, 2))
        return self.classify(anchor, pooled.flatten(1))
