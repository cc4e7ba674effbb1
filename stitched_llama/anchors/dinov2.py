"""DINOv2, as Transformers builds it.

Shapes: hidden [batch, class token + patches, width].
"""

import torch
from torch import Tensor, nn

from .vit import ViTFamily


class Dinov2Family(ViTFamily):
    """`Dinov2ForImageClassification`: a ViT with scaled branches, classified from class token and mean patch."""

    def stages(self, anchor: nn.Module) -> list[tuple[str, nn.Module]]:
        return [("dinov2.encoder.layer", anchor.dinov2.encoder.layer)]

    def head(self, anchor: nn.Module, hidden: Tensor) -> Tensor:
        hidden = anchor.dinov2.layernorm(hidden)
        return self.classify(anchor, torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], 1))
