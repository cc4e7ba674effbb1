"""How a claim is judged: what rows measured, compared seed by seed.

A comparison is paired by seed. It `holds` where the difference has the claimed sign in every seed, `does not` where it has the other
in every seed, and is `open` where seeds disagree. Quality is in points of 100.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stitched_llama.bundles import write_atomically
from stitched_llama.training import spearman

Verdict = tuple[str, str]  # what was found, and whether the claim holds


@dataclass(frozen=True)
class Row:
    """What a run of a setting measured; see `studies.py`."""

    name: str
    seed: int
    content: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.content[name]

    @property
    def metric(self) -> dict[str, float]:
        """key -> points of 100."""
        return {key: 100 * value for key, value in self.content[self.content["metric"]].items()}

    @property
    def mean(self) -> float:
        """Mean quality of all stitches."""
        return statistics.mean(self.metric.values())

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

    @property
    def front(self) -> float:
        """Mean quality that a dial of ten budgets gives, from the smallest to the largest stitch: chosen on one half, judged
        on the other, both ways."""
        params = {stitch["key"]: stitch["params"] for stitch in self["stitches"]}
        low, high, values = min(params.values()), max(params.values()), []
        for half in (0, 1):
            dial = self.dial(half)
            for step in range(10):
                budget = low + (high - low) * step / 9
                values.append([quality for key, quality in dial if params[key] <= budget][-1])
        return statistics.mean(values)

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

    def plot(self, path: Path, task: str) -> None:
        """Quality against parameters: the default of every seed with anchors starred, and its peers' dials."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
        colours = {"default": "tab:blue", "esta": "tab:green", "snnet": "tab:orange", "kaiming": "tab:red"}
        for name, colour in colours.items():
            rows = self[name]
            if not rows:
                continue
            stitches = rows[0]["stitches"]
            size = [s["params"] for s in stitches]
            values = [[row.metric[s["key"]] for row in rows] for s in stitches]
            middle = [statistics.mean(v) for v in values]
            best = [max(middle[: i + 1]) for i in range(len(middle))]
            axis.step(
                size, best, where="post", color=colour, label=f"{name}: the best that fits, mean of {len(rows)} seeds"
            )
            if name == "default":
                axis.errorbar(
                    size, middle, [(v and max(v) - min(v)) / 2 for v in values], fmt="o", ms=4, color=colour, alpha=0.7,
                    label="its stitches, half the range over seeds",
                )  # fmt: skip
            stars = [i for i, s in enumerate(stitches) if s["anchor"]]
            axis.plot([size[i] for i in stars], [middle[i] for i in stars], "*", ms=15, color=colour, mec="black")
        alone = self["alone"]
        if alone and self["default"]:
            own = self["default"][0]["stitches"]
            size = [s["params"] for s in own if s["anchor"]]
            order = sorted(s["key"] for s in own if s["anchor"])
            params = {s["key"]: s["params"] for s in own}
            size = [params[key] for key in order]
            quality = [statistics.mean(row.metric[str(i)] for row in alone) for i in range(len(order))]
            axis.plot(size, quality, "D", color="black", label="anchor tuned alone by LoRA")
        axis.set_xlabel("parameters of the stitch")
        axis.set_ylabel("accuracy (%)" if task == "vision" else "exact match (%)")
        axis.set_title(f"{task}: every stitch and its peers; stars are the anchors")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
        plt.close(figure)


FACTORS = {
    ("PST", "one stage", "taught"): "default", ("PST", "one stage", "untaught"): "no distillation",
    ("PST", "three stages", "taught"): "adapted", ("PST", "three stages", "untaught"): "adapted, no distillation",
    ("full", "one stage", "taught"): "full", ("full", "one stage", "untaught"): "full, no distillation",
    ("full", "three stages", "taught"): "adapted full", ("full", "three stages", "untaught"): "adapted full, no distillation",
}  # fmt: skip


def spread(values: Sequence[float], digits: int = 1) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def sign(values: Sequence[float]) -> str:
    """Whether a difference that is claimed to be positive is."""
    if all(value > 0 for value in values):
        return "holds"
    return "does not" if all(value < 0 for value in values) else "open"


def better(name: str, *others: str) -> Callable[[Rows, str], Verdict]:
    """`name` above each of `others`, by the dial and by the mean over all stitches."""

    def judge(rows: Rows, task: str) -> Verdict:
        parts, found = [], []
        for other in others:
            dial = rows.differences(name, other, lambda row: row.front)
            mean = rows.differences(name, other, lambda row: row.mean)
            parts.append(f"dial {spread(dial)}, all {spread(mean)} over {other}")
            found.append(sign(dial))
        return "; ".join(parts), found[0] if len(set(found)) == 1 else " / ".join(found)

    return judge


def shape(rows: Sequence[Row]) -> tuple[str, float]:
    """How far the stitches of some runs lie on a line between the anchors, and the lowest Spearman."""
    ranks, drops, off = [], [], []
    for row in rows:
        stitches, metric = row["stitches"], row.metric
        ranks.append(row["spearman"])
        values = [metric[s["key"]] for s in stitches]
        pairs = [(i, j) for i in range(len(values)) for j in range(i)]
        drops.append(sum(values[i] < values[j] for i, j in pairs) / len(pairs))
        ends = sorted((s["params"], metric[s["key"]]) for s in stitches if s["anchor"])
        inner = [s for s in stitches if not s["anchor"]]
        off.append(statistics.mean(metric[s["key"]] - line(ends, s["params"]) for s in inner))
    here = (
        f"Spearman {spread(ranks, 2)}; inverted pairs {spread([100 * d for d in drops])} %; {spread(off)} off the line"
    )
    return here, min(ranks)


def _part(lowest: float) -> str:
    return "holds" if lowest >= 0.9 else "only in part" if lowest >= 0.5 else "does not"


def interpolates(rows: Rows, task: str) -> Verdict:
    here, lowest = shape(rows["default"])
    return here, _part(lowest)


def made_otherwise(*names: str, peer: str | None = None) -> Callable[[Rows, str], Verdict]:
    """The shape of the curve of other anchors, and how far it lies above a peer's."""

    def judge(rows: Rows, task: str) -> Verdict:
        parts, found = [], []
        for name in names:
            here, lowest = shape(rows[name])
            parts.append(f"{name}: {here}")
            found.append(_part(lowest))
        if peer:
            text, verdict = better(names[0], peer)(rows, task)
            parts.append(text)
            found.append(verdict)
        return "; ".join(parts), " / ".join(found)

    return judge


def line(ends: list[tuple[int, float]], x: int) -> float:
    """Quality at `x` parameters on the straight line between neighbouring anchors."""
    for (x0, y0), (x1, y1) in zip(ends, ends[1:]):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ends[-1][1]


def start(rows: Rows, task: str) -> Verdict:
    here, verdict = better("default", "kaiming", "mean")(rows, task)
    if task == "language":
        before = [
            f"{name} {spread([100 * statistics.mean(r['before'].values()) for r in rows[name]])}"
            for name in ("default", "kaiming", "mean")
        ]
        here += "; before training: " + ", ".join(before)
    return here, verdict


def factor(index: int) -> Callable[[Rows, str], Verdict]:
    """One factor of the three at a time, the other two held: the mean difference of the four pairs."""

    def judge(rows: Rows, task: str) -> Verdict:
        ours = [names for names in FACTORS if names[index] == next(iter(FACTORS))[index]]
        effects: list[list[float]] = []
        for names in ours:
            other = next(
                n
                for n in FACTORS
                if n[index] != names[index] and n[:index] + n[index + 1 :] == names[:index] + names[index + 1 :]
            )
            effects.append(rows.differences(FACTORS[names], FACTORS[other], lambda row: row.front))
        seeds = [statistics.mean(values) for values in zip(*effects)]
        each = ", ".join(
            f"{'+'.join(n for i, n in enumerate(names) if i != index)} {spread(e)}" for names, e in zip(ours, effects)
        )
        return f"{spread(seeds)} on the dial ({each})", sign(seeds)

    return judge


def cost(rows: Rows, task: str) -> Verdict:
    parts = []
    for name in ("default", "snnet"):
        one = rows[name]
        parts.append(
            f"{name}: {one[0]['trained']:,} trained, {spread([r['memory_mb'] for r in one], 0)} MB, "
            f"{spread([r['train_seconds'] for r in one], 0)} s, dial {spread([r.front for r in one])}"
        )
    less = [b["trained"] / a["trained"] for a, b in zip(rows["default"], rows["snnet"])]
    memory = [b["memory_mb"] - a["memory_mb"] for a, b in zip(rows["default"], rows["snnet"])]
    return "; ".join(parts) + f"; {less[0]:.1f} times fewer", sign(
        [min(memory), min(rows.differences("default", "snnet", lambda row: row.front))]
    )


def against_alone(rows: Rows, task: str) -> Verdict:
    here, worst = gaps_to_alone(rows, "default")
    return f"{here} against its own run of as many steps", "holds" if worst >= -3 else "does not"


def starving(rows: Rows, task: str) -> Verdict:
    found = {name: gaps_to_alone(rows, name) for name in ("default", "no sandwich")}
    here = "; ".join(f"{name}: {text}" for name, (text, _) in found.items())
    return here, "holds" if found["default"][1] >= -3 else "does not"


def gaps_to_alone(rows: Rows, name: str) -> tuple[str, float]:
    """Points of each anchor over its own run, and the worst of all."""
    parts, worst = [], []
    for index in range(len(rows[name][0].anchors)):
        pairs = zip(rows[name], rows["alone"], strict=True)
        gaps = [row.metric[sorted(row.anchors)[index]] - alone.metric[str(index)] for row, alone in pairs]
        parts.append(f"anchor {index} {spread(gaps)}")
        worst.append(min(gaps))
    return ", ".join(parts), min(worst)


def importance(rows: Rows, task: str) -> Verdict:
    ranks, hits, regrets = [], [], []
    for row in rows["uniform"]:
        inside, right, regret = [], [], []
        for group in row.intervals():
            known = [s for s in group if s["importance"] is not None]
            if len(known) < 2:
                continue
            quality = [row.metric[s["key"]] for s in known]
            scores = [s["importance"] for s in known]
            rank = spearman(scores, quality)
            if rank == rank:
                inside.append(rank)
            chosen = quality[scores.index(max(scores))]
            right.append(chosen == max(quality))
            regret.append(max(quality) - chosen)
        if not inside:
            return "too few draws to tell", "open"
        ranks.append(statistics.mean(inside))
        hits.append(statistics.mean(right))
        regrets.append(statistics.mean(regret))
    here = f"Spearman inside intervals {spread(ranks, 2)}; best of its interval {spread([100 * h for h in hits], 0)} %; regret {spread(regrets)}"
    return here, "holds" if min(ranks) >= 0.6 and min(hits) >= 0.8 else "does not"


def ranks(rows: Rows, task: str) -> Verdict:
    values = {name: rows.each(name, lambda row: row.front) for name in ("rank half", "default", "rank double")}
    means = [statistics.mean(v) for v in values.values()]
    here = ", ".join(f"{name} {spread(v)}" for name, v in values.items())
    return here, "holds" if max(means) - min(means) < 2 else "does not"


def shots(rows: Rows, task: str) -> Verdict:
    values = {name: rows.each(name, lambda row: row.front) for name in ("shots 1", "shots 4", "default", "shots 16")}
    ranks = {name: statistics.mean(row["spearman"] for row in rows[name]) for name in values}
    here = ", ".join(f"{name} {spread(v)} (Spearman {ranks[name]:.2f})" for name, v in values.items())
    means = [statistics.mean(v) for v in values.values()]
    return here, "holds" if means == sorted(means) else "does not"


def angles(rows: Rows, task: str) -> Verdict:
    parts, means = [], []
    for name in ("angles, target", "angles, source"):
        mean, above = ([row["angles"][what] for row in rows[name]] for what in ("mean", "above_90"))
        parts.append(f"{name.split(', ')[1]} {spread(mean)}°, {spread([100 * a for a in above], 0)} % above 90°")
        means.append(mean)
    return "; ".join(parts), sign([a - b for a, b in zip(*means)])


def differ(rows: Rows, task: str) -> Verdict:
    """Whether two tasks' most important stitch of an interval differs more often than two runs' of one task."""

    def share(one: Row, other: Row) -> float:
        other_scores = {s["key"]: s["importance"] for s in other["stitches"]}
        changed = []
        for group in one.intervals():
            known = [s for s in group if s["importance"] is not None and other_scores[s["key"]] is not None]
            if len(known) > 1:
                here = max(known, key=lambda s: s["importance"])["key"]
                changed.append(here != max(known, key=lambda s: other_scores[s["key"]])["key"])
        return statistics.mean(changed) if changed else 0.0

    both = rows["words"], rows["numbers"]
    across = [statistics.mean(share(one, other) for other in both[1]) for one in both[0]]
    within = [
        statistics.mean([share(a[i], b) for a in both for b in a if b.seed != a[i].seed] or [0.0])
        for i in range(len(both[0]))
    ]
    here = f"another stitch in {spread([100 * a for a in across], 0)} % of the intervals, {spread([100 * w for w in within], 0)} % between seeds of one task"
    return here, sign([a - w for a, w in zip(across, within)])


def gaps(*pairs: tuple[str, str]) -> Callable[[Rows, str], Verdict]:
    """Mean quality of the stitches themselves, anchors left out, and their mean operations."""

    def inner(row: Row, what: str) -> float:
        own = [s for s in row["stitches"] if not s["anchor"]]
        return statistics.mean(row.metric[s["key"]] if what == "quality" else s["macs"] for s in own)

    def judge(rows: Rows, task: str) -> Verdict:
        parts, found = [], []
        for name, other in pairs:
            difference = rows.differences(name, other, lambda row: inner(row, "quality"))
            times = inner(rows[name][0], "macs") / inner(rows[other][0], "macs")
            values = spread(rows.each(name, lambda row: inner(row, "quality")))
            parts.append(f"{name} {values}, {spread(difference)} over {other} at {times:.2f} times its operations")
            found.append(sign(difference))
        return "; ".join(parts), found[0] if len(set(found)) == 1 else " / ".join(found)

    return judge


def counted(rows: Rows, task: str) -> Verdict:
    import counts

    printed = [(published, ours) for _, _, published, ours, _ in counts.rows() if published == published]
    close = sum(abs(ours / published - 1) < 0.02 for published, ours in printed)
    return f"{close} of {len(printed)} within 2 %; each, with its reason, in results/counts.txt", (
        "holds" if close == len(printed) else "only in part"
    )


def equal_time(rows: Rows, task: str) -> Verdict:
    """All stages counted: SN-Net adapts its anchors first."""
    pairs = (
        ("default", "esta, equal time"), ("default, as long as snnet", "snnet"), ("default", "snnet, one stage, equal time"),
    )  # fmt: skip
    found = [better(one, other)(rows, task) for one, other in pairs]
    return "; ".join(here for here, _ in found), " / ".join(verdict for _, verdict in found)


def aligned(rows: Rows, task: str) -> Verdict:
    """Loss before any training over the line between the anchors', then what is left of it after the fine-tune."""

    def valley(row: Row, losses: dict[str, float]) -> float:
        ends = sorted((s["params"], losses[s["key"]]) for s in row["stitches"] if s["anchor"])
        return statistics.mean(losses[s["key"]] - line(ends, s["params"]) for s in row["stitches"] if not s["anchor"])

    own = rows["apart, aligned"]
    first = [valley(row, row["loss_unaligned"]) for row in own]
    then = [valley(row, row["loss_fitted"]) for row in own]
    seconds = [a["calibration_seconds"] - b["calibration_seconds"] for a, b in zip(own, rows["apart"])]
    lifted = [100 * (1 - b / a) for a, b in zip(first, then)]
    here = f"valley {spread(first, 2)} to {spread(then, 2)} nats ({spread(lifted, 0)} %) in {spread(seconds, 0)} s"
    text, verdict = better("apart, aligned", "apart", "apart, longer")(rows, task)
    return f"{here}; after the fine-tune {text}", verdict


def monotone(rows: Rows, task: str) -> Verdict:
    steps, falls, within = 0, 0, 0
    for row in rows["default"]:
        for half in (0, 1):
            dial, count = row.dial(half), row["half_rows"][1 - half]
            for (_, low), (_, high) in zip(dial, dial[1:]):
                steps += 1
                if high < low:
                    falls += 1
                    within += low - high <= margin(low, high, count)
    return (
        f"{falls} of {steps} steps fall, {falls - within} of them by more than chance",
        "holds" if falls == within else "does not",
    )


def margin(low: float, high: float, count: int) -> float:
    """Half a 95 % confidence interval of the difference of two shares in points, of `count` rows each."""
    p, q = low / 100, high / 100
    return 196 * ((p * (1 - p) + q * (1 - q)) / count) ** 0.5
