"""Junctions by what fits: a band of candidate pairs of blocks is fitted, and the pairs whose stitches lose least are proposed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

from torch import Tensor

from stitched_llama.space import Stitch, pareto_front


@dataclass(frozen=True)
class JunctionProposal:
    """What was measured of candidate junctions, and which are proposed.

    Attributes:
        junctions: `[source anchor, source block, target anchor, target block]` each, for the option `junctions` of a space.
        r2: stitch key -> R2 of the least-squares fit; none for identity junctions.
        loss: stitch key -> loss before any training, nats a token, of each candidate's stitch and the anchors.
        proposed: keys of the proposed stitches, ascending in parameters: the predicted front.
        adapter: what joined them, for the option `adapter` of a space.
    """

    junctions: list[list[int]]
    r2: dict[str, float]
    loss: dict[str, float]
    proposed: list[str]
    adapter: str = "linear"

    def __str__(self) -> str:
        lines = [f"{'stitch':<24} {'R2':>7} {'loss before training':>20}  proposed"]
        for key, loss in self.loss.items():
            lines.append(
                f"{key:<24} {self.r2.get(key, nan):7.3f} {loss:20.4f}  {'yes' if key in self.proposed else ''}"
            )
        return "\n".join(lines)


def candidate_junctions(small_depth: int, large_depth: int, band: int) -> list[list[int]]:
    """Pairs (source block, target block) at most `band` target blocks away from the nearest depth."""
    pairs = []
    for block in range(small_depth - 1):
        centre = round((block + 1) * large_depth / small_depth)
        pairs += [[block, target] for target in range(centre - band, centre + band + 1) if 1 <= target < large_depth]
    return pairs


def propose_junctions(
    model_class: Any,
    anchors: Sequence[Any],
    batches: Iterable[dict[str, Tensor]],
    band: int = 2,
    at_once: int = 16,
    adapter: str | None = None,
    progress: bool = True,
    **calibration: Any,
) -> JunctionProposal:
    """Fits every candidate pair of blocks of two anchors and proposes those whose stitches are on the front of loss and parameters.

    Args:
        model_class: the stitched class of the anchors.
        anchors: two loaded models, small and large.
        batches: as `calibrate` takes them; one pass for each `at_once` candidates.
        band: target blocks beside the nearest depth that are tried for each source block.
        at_once: candidates fitted in one pass; memory grows with them, O(width^2) each.
        adapter: `"linear"`, or `"identity"` for equal widths; the latter by default where they are equal.

    Raises:
        ValueError: other than two anchors, no batches, or a loss that is not finite.

    Source: KLAS (arXiv 2605.29259) chooses stitching points by similarity; the measure here is the loss of the stitch itself.
    """
    if len(anchors) != 2 or band < 0 or at_once < 1:
        raise ValueError(
            f"{len(anchors)} anchors, band {band}, at_once {at_once}: two anchors, 0 or more, 1 or more are needed"
        )
    configs = [anchor.config for anchor in anchors]
    depths = [config.num_hidden_layers for config in configs]
    if adapter is None:
        adapter = "identity" if configs[0].hidden_size == configs[1].hidden_size else "linear"
    batches = list(batches)
    pairs = candidate_junctions(*depths, band)
    stitches: dict[str, Stitch] = {}
    junctions: dict[str, list[int]] = {}
    r2: dict[str, float] = {}
    loss: dict[str, float] = {}
    for start in range(0, len(pairs), at_once):
        model = model_class.from_anchors(anchors, junctions=pairs[start : start + at_once], adapter=adapter)
        report = model.calibrate(batches, progress=progress, **calibration)
        if wrong := [key for key, value in report.loss.items() if not isfinite(value)]:
            raise ValueError(
                f"stitch {wrong[0]} has the loss {report.loss[wrong[0]]}: weights of an anchor are damaged, or the dtype is too narrow"
            )
        loss |= report.loss
        stitches |= {stitch.key: stitch for stitch in model.space}
        for stitch in model.space:
            for junction in stitch.junctions:
                junctions[stitch.key] = [junction.head, junction.head_stop - 1, junction.tail, junction.tail_start]
                r2 |= {stitch.key: report.r2[str(junction)]} if str(junction) in report.r2 else {}
    ascending = sorted(stitches.values(), key=lambda stitch: (stitch.params, stitch.key))
    small = next(stitch for stitch in ascending if stitch.key == f"0[0:{depths[0]}]")
    front = pareto_front([s for s in ascending if s.params >= small.params], loss, higher_is_better=False)
    loss = {stitch.key: loss[stitch.key] for stitch in ascending if stitch.key in loss}
    return JunctionProposal([junctions[key] for key in front if key in junctions], r2, loss, front, adapter)
