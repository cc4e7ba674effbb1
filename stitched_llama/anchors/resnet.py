"""ResNet, as Transformers builds it.

Shapes: hidden [batch, channels, height, width]; the first block of a later stage halves the map itself.
"""

from torch import Tensor, nn

from .image import ImageFamily


class ResNetFamily(ImageFamily):
    """`ResNetForImageClassification`: basic or bottleneck blocks."""

    def stages(self, anchor: nn.Module) -> list[tuple[str, nn.Module]]:
        stages = anchor.resnet.encoder.stages
        return [(f"resnet.encoder.stages.{number}.layers", stage.layers) for number, stage in enumerate(stages)]

    def embed(self, anchor: nn.Module, inputs: Tensor) -> Tensor:
        return anchor.resnet.embedder(inputs)

    def head(self, anchor: nn.Module, hidden: Tensor) -> Tensor:
        return self.classify(anchor, anchor.resnet.pooler(hidden))
