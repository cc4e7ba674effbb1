"""ConvNeXt, as Transformers builds it.

Shapes: hidden [batch, width of the stage, height, width].
"""

from torch import Tensor, nn

from .image import ImageFamily


class ConvNextFamily(ImageFamily):
    """`ConvNextForImageClassification`: convolutions in stages, a norm and a strided convolution between them."""

    def stages(self, anchor: nn.Module) -> list[tuple[str, nn.Module]]:
        stages = anchor.convnext.encoder.stages
        return [(f"convnext.encoder.stages.{number}.layers", stage.layers) for number, stage in enumerate(stages)]

    def embed(self, anchor: nn.Module, inputs: Tensor) -> Tensor:
        return anchor.convnext.embeddings(inputs)

    def between(self, anchor: nn.Module, stage: int, hidden: Tensor) -> Tensor:
        for layer in anchor.convnext.encoder.stages[stage].downsampling_layer:
            hidden = layer(hidden)
        return hidden

    def head(self, anchor: nn.Module, hidden: Tensor) -> Tensor:
        return self.classify(anchor, anchor.convnext.layernorm(hidden.mean([-2, -1])))
