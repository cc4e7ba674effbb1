"""Selection of published stitches: the Pareto front of a metric, or the best of each cost interval."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from .stitch import Stitch


def pareto_front(stitches: Sequence[Stitch], metric: Mapping[str, float], higher_is_better: bool) -> list[str]:
    """Keys of the stitches with a better metric than all stitches of at most their parameters, ascending in parameters.

    Stitches without a finite metric are never on the front.
    """
    sign = 1 if higher_is_better else -1
    front: list[str] = []
    best = float("-inf")
    measured = [stitch for stitch in stitches if math.isfinite(metric.get(stitch.key, math.nan))]
    for stitch in sorted(measured, key=lambda s: (s.params, -sign * metric[s.key], s.key)):
        if sign * metric[stitch.key] > best:
            front.append(stitch.key)
            best = sign * metric[stitch.key]
    return front


def intervals(costs: Sequence[float], count: int) -> list[list[int]]:
    """Indices grouped into `count` equal intervals of the cost range, without empty intervals (ESTA section 4.2).

    Raises:
        ValueError: `count` below 1 or no costs.
    """
    if count < 1 or not costs:
        raise ValueError(f"{count} intervals over {len(costs)} costs: at least 1 of each is needed")
    low, high = min(costs), max(costs)
    width = (high - low) / count or 1.0
    groups: dict[int, list[int]] = defaultdict(list)
    for index, cost in enumerate(costs):
        groups[min(int((cost - low) / width), count - 1)].append(index)
    return [groups[number] for number in sorted(groups)]


def best_of_intervals(stitches: Sequence[Stitch], importance: Mapping[str, float], count: int) -> list[str]:
    """The key of highest importance in each interval of parameters (ESTA: deployment without evaluation)."""
    groups = intervals([stitch.params for stitch in stitches], count) if importance else []
    scored = [[stitches[i].key for i in group if stitches[i].key in importance] for group in groups]
    return [max(keys, key=lambda key: importance[key]) for keys in scored if keys]
