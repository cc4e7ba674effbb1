"""What the paper compares PST with, as far as no library of ours needs it: LoRA branches of each stitch's own (figure 6b), adapters
after each block's feed-forward (Houlsby et al. 2019) and beside it (AdaptFormer, Chen et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn


def attach_peer(model: Any, peer: str, ranks: Sequence[int]) -> None:
    """Adds the trainable parts of a peer, zero-initialised, to a model that has its PST.

    Args:
        peer: `"stitch lora"`, of rank 1; `"adapter"` or `"adaptformer"` (for ViTs), which take the place of LoRA.
        ranks: of the LoRA of each anchor; a bottleneck is four times as wide, as LoRA has four layers a block.
    """
    if peer == "stitch lora":
        _stitch_lora(model, 1)
    else:
        for index, rank in enumerate(ranks):
            for block in model.blocks(index):
                width = block.layernorm_after.normalized_shape[0]
                bottleneck = Bottleneck(width, 4 * rank, scale=0.1 if peer == "adaptformer" else 1.0)
                block.mlp.bottleneck = bottleneck
                block.mlp.register_forward_hook(_beside if peer == "adaptformer" else _after)


class Bottleneck(nn.Module):
    """[..., width] -> [..., width] through `rank` units; zero at birth."""

    def __init__(self, width: int, rank: int, scale: float):
        super().__init__()
        self.down, self.up, self.scale = nn.Linear(width, rank), nn.Linear(rank, width), scale
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.down(x).relu())


def _after(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output + module.bottleneck(output)


def _beside(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output + module.bottleneck(args[0])


def _stitch_lora(model: Any, rank: int) -> None:
    """Beside the shared branch, one for each stitch in each block of its route; only the running stitch's is active."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    config, shared = LoraConfig(r=rank, lora_alpha=rank), "default"
    names = {}
    for number, key in enumerate(model.keys):
        names[key] = f"stitch{number}"
        for anchor, block in model.space[key].blocks():
            for layer in model.blocks(anchor)[block].modules():
                if isinstance(layer, LoraLayer):
                    # of the class: at the layer itself PST refuses others
                    type(layer).update_layer(layer, names[key], rank, rank, config)
    layers = [module for module in model.anchors.modules() if isinstance(module, LoraLayer)]
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    model.register_forward_pre_hook(partial(_activate, layers, names, shared), with_kwargs=True)


def _activate(layers: list, names: dict, shared: str, model: Any, args: tuple, kwargs: dict) -> None:
    own = names[model.stitch(kwargs.get("stitch_id")).key]
    for layer in layers:
        layer._active_adapter = [shared, own]  # PEFT's set_adapter would also freeze what is not active
