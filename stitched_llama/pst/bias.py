"""The stitch-specific bias: one vector a stitch, sliced along its route, for the adapted layers (q, k, v, o) of its blocks."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stitched_llama.space import Stitch, StitchSpace


class StitchBias(nn.Module):
    """Biases of the stitches, zero-initialised; only rows of blocks on a stitch's own route exist.

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
