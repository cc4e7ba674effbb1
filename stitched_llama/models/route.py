"""The one route walk that serves every family."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from stitched_llama.anchors import Family
from stitched_llama.space import Stitch


def walk(
    families: Sequence[Family],
    anchors: Sequence[nn.Module],
    stitching_layers: Mapping[str, nn.Module],
    stitch: Stitch,
    hidden: Tensor,
    context: Any,
) -> Tensor:
    """From the embedding of the first anchor to the last block of the last: segments, joined by stitching layers."""
    slot = 0
    for index, segment in enumerate(stitch.segments):
        if index:
            hidden = stitching_layers[stitch.junctions[index - 1].layer](hidden)
        hidden = families[segment.anchor].run(
            anchors[segment.anchor], hidden, segment.start, segment.stop, slot, context
        )
        slot += len(segment)
    return hidden
