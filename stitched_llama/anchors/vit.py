"""ViT and DeiT, as Transformers builds them.

Shapes: hidden [batch, special tokens + patches, width].
"""

from typing import Any

import torch
from torch import Tensor, nn

from .image import ImageFamily


class ViTFamily(ImageFamily):
    """`ViTForImageClassification` and `DeiTForImageClassification`: classified from the class token."""

    layout = "tokens"

    def stages(self, anchor: nn.Module) -> list[tuple[str, nn.Module]]:
        return [(f"{anchor.base_model_prefix}.layers", anchor.base_model.layers)]

    def adapted(self, block: nn.Module) -> nn.Module:
        return block.attention

    def embed(self, anchor: nn.Module, inputs: Tensor) -> Tensor:
        return anchor.base_model.embeddings(inputs)

    def special_tokens(self, anchor: nn.Module) -> Tensor | None:
        embeddings = anchor.base_model.embeddings
        tokens = [getattr(embeddings, name, None) for name in ("cls_token", "distillation_token")]
        tokens = [token for token in tokens if token is not None]
        return torch.cat(tokens, 1) + embeddings.position_embeddings[:, : len(tokens)]

    def step(self, block: nn.Module, hidden: Tensor, **extra: Any) -> Tensor:
        return block(hidden, None, **extra)

    def head(self, anchor: nn.Module, hidden: Tensor) -> Tensor:
        return self.classify(anchor, anchor.base_model.layernorm(hidden)[:, 0])
