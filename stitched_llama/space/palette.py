"""Palette gain: the value of the stitches between two anchors for a choice by budget."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from .metrics import higher_is_better
from .space import StitchSpace

TEST = "_test"


class Measurements(Protocol):
    """The fields of `StitchTable` that a palette gain needs."""

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]]: ...

    @property
    def alone(self) -> Mapping[str, Mapping[str, float]]: ...


def palette_gain(
    space: StitchSpace,
    table: Measurements,
    alone: Mapping[str, Mapping[str, float]] | None = None,
    metric: str = "loss",
    by: str = "params",
) -> float:
    """The share of the quality gap between the smallest and the largest anchor that the stitch chosen by a budget closes, averaged over
    budgets from the one's cost to the other's.

    A budget selects the stitch of best `metric` that fits; its quality is `metric` + `"_test"`, measured on other rows. An anchor has
    its values in the run or those of the anchor fine-tuned alone, whichever has the better `metric`.

    0: no better than the small anchor for every budget; 0.5: a continuous straight line; `n / (2 (n + 1))`: n evenly spaced stitches
    on that line; below 0: budgets select stitches that are worse than the small anchor.

    Args:
        alone: anchor key -> metric name -> value of that anchor fine-tuned alone; by default from the table.
        by: the cost that budgets limit, `"params"` or `"macs"`.

    Returns:
        NaN if the metric is missing for an anchor, or the large anchor is not better than the small one or costs no more.

    Raises:
        ValueError: another `by`, or a metric that is unknown or was not measured on test rows.
    """
    if by not in ("params", "macs"):
        raise ValueError(f"by is {by!r}: 'params' or 'macs' is needed")
    sign = 1 if higher_is_better(metric) else -1
    missing = [name for name in (metric, metric + TEST) if name not in table.metrics]
    if missing:
        raise ValueError(
            f"the table holds {', '.join(table.metrics) or 'no metric'}, and no {missing[0]}: palette gain needs {metric} of the rows "
            f"that choose and {metric + TEST} of others"
        )
    pairs, alone = {}, table.alone if alone is None else alone
    for stitch in space:
        found = [{name: values[stitch.key] for name, values in table.metrics.items() if stitch.key in values}]
        found += [dict(alone[stitch.key])] if stitch.is_anchor and stitch.key in alone else []
        found = [f for f in found if all(math.isfinite(f.get(n, math.nan)) for n in (metric, metric + TEST))]
        if found:
            best = max(found, key=lambda f: sign * f[metric])
            pairs[stitch.key] = sign * best[metric], sign * best[metric + TEST]
    small, large = space.anchor_stitch(0), space.anchor_stitch(-1)
    if small.key not in pairs or large.key not in pairs or not pairs[large.key][1] > pairs[small.key][1]:
        return math.nan
    if not getattr(large, by) > getattr(small, by):
        return math.nan
    between = [stitch for stitch in space if getattr(small, by) < getattr(stitch, by) < getattr(large, by)]
    between = sorted((s for s in between if s.key in pairs), key=lambda stitch: (getattr(stitch, by), stitch.key))
    return staircase_gain([(getattr(s, by), *pairs[s.key]) for s in (small, *between, large)])


def staircase_gain(points: Sequence[tuple[float, float, float]]) -> float:
    """Palette gain of any models between two, the first and the last of `points`.

    Args:
        points: (cost, value used for the choice, value on test rows) of each, ascending in cost; higher is better.
    """
    start, stop, base, gap = points[0][0], points[-1][0], points[0][2], points[-1][2] - points[0][2]
    area, chosen = 0.0, points[0]
    for point, after in zip(points, points[1:]):
        chosen = max(chosen, point, key=lambda candidate: candidate[1])
        area += (after[0] - point[0]) * (chosen[2] - base) / gap
    return area / (stop - start)


def palette_gains(
    space: StitchSpace, table: Measurements, alone: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, dict[str, float]]:
    """`palette_gain` of every metric that was also measured on test rows, by parameters and by MACs: metric -> cost -> gain."""
    names = [name for name in table.metrics if name + TEST in table.metrics]
    return {name: {by: palette_gain(space, table, alone, name, by) for by in ("params", "macs")} for name in names}
