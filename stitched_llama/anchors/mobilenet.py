"""MobileNetV2, as Transformers builds it.

Shapes: hidden [batch, channels, height, width]; a block with stride 2 halves the map itself.
"""

from torch import Tensor, nn

from .image import ImageFamily


class MobileNetV2Family(ImageFamily):
    """`MobileNetV2ForImageClassification`: sixteen inverted residuals; the last 1x1 convolution belongs to the head."""

    def stages(self, anchor: nn.Module) -> list[tuple[str, nn.Module]]:
        return [("mobilenet_v2.layer", anchor.mobilenet_v2.layer)]

    def embed(self, anchor: nn.Module, inputs: Tensor) -> Tensor:
        return anchor.mobilenet_v2.conv_stem(inputs)

    def head(self, anchor: nn.Module, hidden: Tensor) -> Tensor:
        pooled = anchor.mobilenet_v2.pooler(anchor.mobilenet_v2.conv_1x1(hidden)).flatten(1)
        return self.classify(anchor, anchor.dropout(pooled))
