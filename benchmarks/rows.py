"""What the runs measured, row by row: qualities in points of 100, the dial of published stitches, and the plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stitched_llama.bundles import write_atomically


@dataclass(frozen=True)
class Row:
    """What a run of a setting measured; see `studies.py`."""

    name: str
    seed: int
    content: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.content[name]

    @property
    def accuracy(self) -> dict[str, float]:
        """key -> points of 100."""
        return {key: 100 * value for key, value in self["accuracy"].items()}

    @property
    def mean(self) -> float:
        """Mean quality of all stitches."""
        return statistics.mean(self.accuracy.values())

    @property
    def anchors(self) -> list[str]:
        return [stitch["key"] for stitch in self["stitches"] if stitch["anchor"]]

    def dial(self, chosen_on: int) -> list[tuple[str, float]]:
        """`(key, quality on the other half)` of the stitches published by one half of the held-out rows, small to large."""
        here, there = self["halves"][chosen_on], self["halves"][1 - chosen_on]
        best, found = -1.0, []
        for stitch in self["stitches"]:
            if here[stitch["key"]] > best:
                best = here[stitch["key"]]
                found.append((stitch["key"], 100 * there[stitch["key"]]))
        return found

    def falls(self, chosen_on: int) -> tuple[int, int, int]:
        """Pairs of published sizes, pairs whose larger is worse, and those of them that chance does not explain.

        The sizes are chosen on one half of the held-out rows. On the rows of the other a pair is compared by McNemar's
        test of the rows that only one of them gets right, at 5 % for all pairs of the dial together (Bonferroni).
        """
        keys = [key for key, _ in self.dial(chosen_on)]
        right = {key: int(self["hits"][1 - chosen_on][key], 16) for key in keys}
        pairs = [(low, high) for i, high in enumerate(keys) for low in keys[:i]]
        worse, beyond = 0, 0
        for low, high in pairs:
            lost, won = (right[low] & ~right[high]).bit_count(), (right[high] & ~right[low]).bit_count()
            worse += lost > won
            beyond += lost > won and binomial_tail(lost, lost + won) < 0.05 / len(pairs)
        return len(pairs), worse, beyond

    @property
    def by_budget(self) -> list[tuple[float, float]]:
        """`(parameters, quality)` that a dial gives at ten budgets, from the smallest to the largest stitch: chosen on one half,
        judged on the other, both ways."""
        params = {stitch["key"]: stitch["params"] for stitch in self["stitches"]}
        low, high, dials = min(params.values()), max(params.values()), (self.dial(0), self.dial(1))
        budgets = [low + (high - low) * step / 9 for step in range(10)]
        return [
            (budget, statistics.mean([value for key, value in dial if params[key] <= budget][-1] for dial in dials))
            for budget in budgets
        ]

    @property
    def front(self) -> float:
        """Mean quality that the dial gives at those budgets."""
        return statistics.mean(quality for _, quality in self.by_budget)

    @property
    def publishes_stitches(self) -> bool:
        """Whether either dial has more than anchors on it."""
        return any(key not in self.anchors for half in (0, 1) for key, _ in self.dial(half))

    def intervals(self) -> list[list[dict[str, Any]]]:
        """Its stitches by cost interval of training, those of two and more."""
        from stitched_llama.space import intervals

        count = self["settings"]["interval_count"]
        groups = intervals([stitch["params"] for stitch in self["stitches"]], count)
        return [[self["stitches"][i] for i in group] for group in groups if len(group) > 1]


class Rows:
    """All rows, by setting."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = list(rows)

    def __getitem__(self, name: str) -> list[Row]:
        return sorted((row for row in self.rows if row.name == name), key=lambda row: row.seed)

    def each(self, name: str, measure: Callable[[Row], float]) -> list[float]:
        return [measure(row) for row in self[name]]

    def differences(self, name: str, other: str, measure: Callable[[Row], float]) -> list[float]:
        """`name` less `other`, seed by seed."""
        return [a - b for a, b in zip(self.each(name, measure), self.each(other, measure), strict=True)]

    def plot(self, path: Path) -> None:
        """Quality against parameters: the default's stitches with anchors starred, and the dials it and its peers give, chosen on
        one half of the held-out rows and judged on the other."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axis = plt.subplots(figsize=(8, 6), layout="constrained")
        colours = {"default": "tab:blue", "esta": "tab:green", "snnet": "tab:orange", "kaiming": "tab:red"}
        for name, colour in colours.items():
            rows = self[name]
            if not rows:
                continue
            dials = [row.by_budget for row in rows]
            budgets = [budget for budget, _ in dials[0]]
            values = [[dial[i][1] for dial in dials] for i in range(len(budgets))]
            label = f"{name}: the dial, mean and range of {len(rows)} seeds"
            axis.plot(budgets, list(map(statistics.mean, values)), drawstyle="steps-post", color=colour, label=label)
            axis.fill_between(
                budgets, list(map(min, values)), list(map(max, values)), step="post", color=colour, alpha=0.15
            )
            stitches = rows[0]["stitches"]
            size = [s["params"] for s in stitches]
            values = [[row.accuracy[s["key"]] for row in rows] for s in stitches]
            middle = [statistics.mean(v) for v in values]
            if name == "default":
                reach = [
                    [m - min(v) for m, v in zip(middle, values)],
                    [max(v) - m for m, v in zip(middle, values)],
                ]
                axis.errorbar(
                    size, middle, reach, fmt="o", ms=4, color=colour, alpha=0.7, label="the default's stitches"
                )
            stars = [i for i, s in enumerate(stitches) if s["anchor"]]
            axis.plot([size[i] for i in stars], [middle[i] for i in stars], "*", ms=15, color=colour, mec="black")
        alone = self["alone"]
        if alone and self["default"]:
            params = {s["key"]: s["params"] for s in self["default"][0]["stitches"] if s["anchor"]}
            size = [params[key] for key in sorted(params)]
            quality = [statistics.mean(row.accuracy[str(i)] for row in alone) for i in range(len(size))]
            axis.plot(size, quality, "D", color="black", label="anchor tuned alone by LoRA")
        axis.set_xlabel("parameters of the stitch")
        axis.set_ylabel("accuracy (%)")
        axis.set_title("vision: every stitch and its peers; stars are the anchors")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
        plt.close(figure)


def spread(values: Sequence[float], digits: int = 1) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def line(ends: list[tuple[int, float]], x: int) -> float:
    """Quality at `x` parameters on the straight line between neighbouring anchors."""
    for (x0, y0), (x1, y1) in zip(ends, ends[1:]):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ends[-1][1]


def binomial_tail(heads: int, tosses: int) -> float:
    """Probability of at least so many heads of a fair coin."""
    return sum(math.comb(tosses, k) for k in range(heads, tosses + 1)) / 2**tosses
