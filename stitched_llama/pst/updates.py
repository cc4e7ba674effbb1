"""What a stitch adds to the adapted layers (q, k, v, o) of its blocks: its own bias, and the LoRA that all stitches share.

Both travel as a keyword of each block, never as module state, so that recomputation under activation checkpointing sees what the
forward did. A hook of the module that owns the adapted layers takes the keyword off and hands it to the hooks of those layers
through a thread-local, within that one call.
"""

import threading
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stitched_llama.anchors import Family
from stitched_llama.space import Stitch, StitchSpace

from .bias import StitchBias

_call = threading.local()


class Update(NamedTuple):
    """Of one adapted layer: bias [d_out], and the factors of LoRA, down [rank, d_in] and up [d_out, rank]; each may be None."""

    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None


class StitchLora(nn.Module):
    """A LoRA on the adapted layers that every stitch between the anchors has, and the anchors alone do without; zero-initialised.

    Args:
        blocks: (anchor, block) pairs that lie on a stitch.
        rank: of the update.
    """

    def __init__(
        self,
        space: StitchSpace,
        blocks: Iterable[tuple[int, int]],
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.layers = {}
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for anchor, block in sorted(set(blocks)):
            adapted = space.anchors[anchor].blocks[block].adapted
            self.layers[anchor, block] = [f"{anchor}_{block}_{layer}" for layer, *_ in adapted]
            for name, (_, d_in, d_out) in zip(self.layers[anchor, block], adapted):
                down = torch.empty(rank, d_in, dtype=dtype, device=device)
                nn.init.kaiming_uniform_(down, a=5**0.5)  # as PEFT does
                self.down[name] = nn.Parameter(down)
                self.up[name] = nn.Parameter(torch.zeros(d_out, rank, dtype=dtype, device=device))

    def forward(self, stitch: Stitch) -> list[list[tuple[Tensor, Tensor]]]:
        """For each block of the route (down, up) of each of its adapted layers."""
        return [[(self.down[name], self.up[name]) for name in self.layers[block]] for block in stitch.blocks()]

    def factors(self, anchor: int, block: int, layer: str) -> tuple[Tensor, Tensor] | None:
        """(down, up) of one adapted layer; None where it lies on no stitch."""
        name = f"{anchor}_{block}_{layer}"
        return (self.down[name], self.up[name]) if name in self.down else None


def biases_of(stitch: Stitch, bias: StitchBias | None) -> list[tuple[Tensor, ...]] | None:
    """For each block of a route the biases of its adapted layers; None where the stitch has none."""
    return None if bias is None or stitch.key not in bias.vectors else bias(stitch.key)


def updates_of(stitch: Stitch, bias: StitchBias | None, lora: StitchLora | None) -> list[tuple[Update, ...]] | None:
    """For each block of a route the updates of its adapted layers; None where the stitch has none."""
    biases = biases_of(stitch, bias)
    factors = None if lora is None or stitch.is_anchor else lora(stitch)
    if biases is None and factors is None:
        return None
    found = []
    for slot in range(stitch.depth):
        own = biases[slot] if biases is not None else [None] * len(factors[slot])
        pairs = factors[slot] if factors is not None else [(None, None)] * len(own)
        found.append(tuple(Update(b, *pair) for b, pair in zip(own, pairs)))
    return found


def install_update_hooks(family: Family, block: nn.Module, names: Iterable[str]) -> None:
    """Lets a block take the keyword `stitch_updates`, an `Update` for each layer in `names`."""
    owner = family.adapted(block)
    owner.register_forward_pre_hook(_receive, with_kwargs=True)
    for index, name in enumerate(names):
        owner.get_submodule(name).register_forward_hook(partial(_add, index))


def takes_updates(module: nn.Module) -> bool:
    """Whether a module was given its hook already."""
    return _receive in module._forward_pre_hooks.values()


def _receive(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    _call.updates = kwargs.pop("stitch_updates", None)
    return args, kwargs


def _add(index: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    if _call.updates is None:
        return output
    bias, down, up = _call.updates[index]
    if up is not None and down is not None:
        change = F.linear(F.linear(args[0].to(down), down), up)
        output = output + change.to(device=output.device, dtype=output.dtype)
    if bias is not None:
        own = bias.to(device=output.device, dtype=output.dtype)
        output = output + (own[:, None, None] if isinstance(getattr(module, "base_layer", module), nn.Conv2d) else own)
    return output
