"""The one route walk that serves every family."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from stitched_llama.anchors import Family
from stitched_llama.layers import from_rows, shared_rows, to_rows, with_own_tokens
from stitched_llama.space import AnchorSpec, Junction, Stitch


def walk(
    families: Sequence[Family],
    specs: Sequence[AnchorSpec],
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
            hidden = _cross(families, specs, anchors, stitching_layers, stitch.junctions[index - 1], hidden)
        hidden = families[segment.anchor].run(
            anchors[segment.anchor], hidden, segment.start, segment.stop, slot, context
        )
        slot += len(segment)
    return hidden


def first_norm(block: nn.Module) -> Tensor:
    """A norm's weight of a block: it tells the dtype and device of what enters, also where linear layers are quantised."""
    return next(p for p in block.parameters() if p.ndim == 1 and p.is_floating_point())


def _cross(
    families: Sequence[Family],
    specs: Sequence[AnchorSpec],
    anchors: Sequence[nn.Module],
    stitching_layers: Mapping[str, nn.Module],
    junction: Junction,
    hidden: Tensor,
) -> Tensor:
    """From the output of the source block to the input of the target block."""
    if junction.layer is None:
        anchor = anchors[junction.tail]
        return hidden.to(
            first_norm(anchor.get_submodule(families[junction.tail].block_names(anchor)[junction.tail_start]))
        )
    layer = stitching_layers[junction.layer]
    rows = layer(junction_rows(families, specs, junction, hidden))
    return _enter(families, specs, anchors, junction, rows, layer.tail_grid)


def junction_rows(
    families: Sequence[Family], specs: Sequence[AnchorSpec], junction: Junction, feature: Tensor, tail: bool = False
) -> Tensor:
    """The rows [batch, places, width] of a feature that a stitching layer maps, or maps to (`tail`)."""
    leaves, enters = (
        specs[junction.head].leaves[junction.head_stop - 1],
        specs[junction.tail].enters[junction.tail_start],
    )
    anchor, end = (junction.tail, enters) if tail else (junction.head, leaves)
    shared = min(leaves.special_tokens, enters.special_tokens)
    return shared_rows(to_rows(feature, families[anchor].layout), end.special_tokens, shared)


def _enter(
    families: Sequence[Family],
    specs: Sequence[AnchorSpec],
    anchors: Sequence[nn.Module],
    junction: Junction,
    rows: Tensor,
    grid: tuple[int, int] | None,
) -> Tensor:
    """Mapped rows as the tail's feature at `grid`, its own special tokens filled in."""
    leaves, enters = (
        specs[junction.head].leaves[junction.head_stop - 1],
        specs[junction.tail].enters[junction.tail_start],
    )
    family, anchor = families[junction.tail], anchors[junction.tail]
    if enters.special_tokens > leaves.special_tokens:
        rows = with_own_tokens(rows, family.special_tokens(anchor), leaves.special_tokens)
    return from_rows(rows, family.layout, grid)
