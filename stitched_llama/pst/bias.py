"""The stitch-specific bias: one vector a stitch, sliced along its route, added to the adapted layers (q, k, v, o).

The slices travel as a keyword of each block, never as module state, so that recomputation under activation
checkpointing sees the same slices as the forward did (DESIGN section 4). A hook of the module that owns the adapted
layers takes the keyword off and hands it to the hooks of those layers through a thread-local, within that one call.
"""

import threading
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stitched_llama.anchors import Family
from stitched_llama.space import Stitch, StitchSpace

_call = threading.local()


class StitchBias(nn.Module):
    """Biases of the stitches, zero at birth; only rows of blocks on a stitch's own route exist.

    Each stitch has a Parameter of its own whose gradient is None while it is not drawn: rows of one table would drift
    under an optimiser's momentum and weight decay.
    """

    def __init__(self, space: StitchSpace, stitches: Iterable[Stitch], dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.sizes: dict[str, list[list[int]]] = {}
        self.vectors = nn.ParameterDict()
        for stitch in stitches:
            sizes = [[d_out for *_, d_out in space.anchors[a].blocks[b].adapted] for a, b in stitch.blocks()]
            self.sizes[stitch.key] = sizes
            self.vectors[stitch.key] = nn.Parameter(torch.zeros(sum(map(sum, sizes)), dtype=dtype, device=device))

    def forward(self, key: str) -> list[tuple[Tensor, ...]]:
        """The slices of a stitch.

        Shapes: for each block of the route, a [d_out] for each of its `Part.adapted`, in their order.
        """
        flat = [size for sizes in self.sizes[key] for size in sizes]
        slices = iter(self.vectors[key].split(flat))
        return [tuple(next(slices) for _ in sizes) for sizes in self.sizes[key]]


def install_bias_hooks(family: Family, block: nn.Module, names: Iterable[str]) -> None:
    """Lets a block take the keyword `stitch_bias`, a tensor for each layer in `names`."""
    owner = family.adapted(block)
    owner.register_forward_pre_hook(_receive, with_kwargs=True)
    for index, name in enumerate(names):
        owner.get_submodule(name).register_forward_hook(partial(_add, index))


def takes_bias(module: nn.Module) -> bool:
    """Whether a module was given its hook already."""
    return _receive in module._forward_pre_hooks.values()


def _receive(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    _call.slices = kwargs.pop("stitch_bias", None)
    return args, kwargs


def _add(index: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    if _call.slices is None:
        return output
    own = _call.slices[index].to(device=output.device, dtype=output.dtype)
    return output + (own[:, None, None] if isinstance(getattr(module, "base_layer", module), nn.Conv2d) else own)
