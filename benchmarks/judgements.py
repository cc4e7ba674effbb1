"""How a claim is judged where settings are compared, seed by seed; `curves.py` judges the curves of one.

A comparison is paired by seed. It `holds` where the difference has the claimed sign in every seed and its mean is beyond chance (one-sided
t-test, 5 %), `does not` where the same is true of the other sign, and is `open` otherwise: of comparisons without any difference one in
ten still gets a verdict. Quality is in points of 100.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from rows import Row, Rows, spread

Verdict = tuple[str, str]  # what was found, and whether the claim holds

FACTORS = {
    ("PST", "one stage", "taught"): "default", ("PST", "one stage", "untaught"): "no distillation",
    ("PST", "three stages", "taught"): "adapted", ("PST", "three stages", "untaught"): "adapted, no distillation",
    ("full", "one stage", "taught"): "full", ("full", "one stage", "untaught"): "full, no distillation",
    ("full", "three stages", "taught"): "adapted full", ("full", "three stages", "untaught"): "adapted full, no distillation",
}  # fmt: skip


# 95 % of Student's t lie below, by the number of values
BEYOND_CHANCE = {2: 6.31, 3: 2.92, 4: 2.35, 5: 2.13, 6: 2.02, 7: 1.94, 8: 1.89, 9: 1.86, 10: 1.83}


def sign(values: Sequence[float]) -> str:
    """Whether a difference that is claimed to be positive is; one seed alone leaves that open."""
    if len(values) < 2:
        return "open"
    error = statistics.stdev(values) / len(values) ** 0.5
    if abs(statistics.mean(values)) <= BEYOND_CHANCE.get(len(values), 1.83) * error:
        return "open"
    if all(value > 0 for value in values):
        return "holds"
    return "does not" if all(value < 0 for value in values) else "open"


def several(verdicts: Sequence[str]) -> str:
    """One word where all agree."""
    return verdicts[0] if len(set(verdicts)) == 1 else " / ".join(verdicts)


def better(name: str, *others: str) -> Callable[[Rows, str], Verdict]:
    """`name` above each of `others` by the dial; the mean over all stitches, and what trains, stand beside it."""

    def judge(rows: Rows, task: str) -> Verdict:
        parts, found = [], []
        for other in others:
            dial = rows.differences(name, other, lambda row: row.front)
            mean = rows.differences(name, other, lambda row: row.mean)
            times = rows[other][0]["trained"] / rows[name][0]["trained"]
            trained = "" if abs(times - 1) < 0.005 else f" with {times:.2f} times as much to train"
            parts.append(f"dial {spread(dial)}, all {spread(mean)} over {other}{trained}")
            found.append(sign(dial))
        return "; ".join(parts), several(found)

    return judge


def start(rows: Rows, task: str) -> Verdict:
    here, verdict = better("default", "kaiming")(rows, task)
    if task == "language":  # pictures meet new heads, which know nothing before training
        before = [
            f"{name} {spread([100 * statistics.mean(r['before'].values()) for r in rows[name]])}"
            for name in ("default", "kaiming")
        ]
        losses = [
            f"{spread([statistics.mean(r['loss'].values()) for r in rows[n]], 2)}" for n in ("default", "kaiming")
        ]
        here += "; before training: " + ", ".join(before) + "; loss of all after: " + " and ".join(losses)
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
    """Quality, memory of training and numbers that train, of the default against SN-Net in one stage of as many steps."""
    parts, peer = [], "snnet, one stage"
    for name in ("default", "esta", peer, "snnet"):
        one = rows[name]
        memory = [row["memory_mb"] for row in one if row["memory_mb"] is not None]
        parts.append(
            f"{name}: {one[0]['settings']['max_steps']} steps, {one[0]['trained']:,} train, {spread(memory, 0) if memory else '-'} MB, "
            f"{spread([r['train_seconds'] for r in one], 0)} s, dial {spread([r.front for r in one])}"
        )
    better = rows.differences("default", peer, lambda row: row.front)
    less = rows.differences(peer, "default", lambda row: row["memory_mb"] or 0.0)
    fewer = rows.differences(peer, "default", lambda row: row["trained"])
    return "; ".join(parts), " / ".join(map(sign, (better, less, fewer)))


def dials(rows: Rows, *names: str) -> tuple[str, list[float]]:
    values = {name: rows.each(name, lambda row: row.front) for name in names}
    return ", ".join(f"{name} {spread(v)}" for name, v in values.items()), list(map(statistics.mean, values.values()))


def ranks(rows: Rows, task: str) -> Verdict:
    here, means = dials(rows, "rank quarter", "rank half", "default")
    return here, "holds" if max(means) - min(means) < 2 else "does not"


def shots(rows: Rows, task: str) -> Verdict:
    here, means = dials(rows, "shots 1", "shots 4", "shots 8", "default", "shots 16")
    return here, "holds" if means == sorted(means) else "does not"


def angles(rows: Rows, task: str) -> Verdict:
    parts, means = [], []
    for name in ("angles, target", "angles, source"):
        mean, above = ([row["angles"][what] for row in rows[name]] for what in ("mean", "above_90"))
        parts.append(f"{name.split(', ')[1]} {spread(mean)}°, {spread([100 * a for a in above], 0)} % above 90°")
        means.append(mean)
    return "; ".join(parts), sign([a - b for a, b in zip(*means)])


def differ(name: str, other: str, *same: str) -> Callable[[Rows, str], Verdict]:
    """Whether the most important stitch of an interval changes with the task more often than with the draws (`same`)."""

    def share(one: Row, another: Row) -> float:
        scores = {s["key"]: s["importance"] for s in another["stitches"]}
        changed = []
        for group in one.intervals():
            known = [s for s in group if s["importance"] is not None and scores[s["key"]] is not None]
            if len(known) > 1:
                best = max(known, key=lambda s: s["importance"])["key"]
                changed.append(best != max(known, key=lambda s: scores[s["key"]])["key"])
        return statistics.mean(changed) if changed else 0.0

    def judge(rows: Rows, task: str) -> Verdict:
        across = list(map(share, rows[name], rows[other]))
        within = [statistics.mean(values) for values in zip(*(map(share, rows[name], rows[peer]) for peer in same))]
        here = f"another stitch in {spread([100 * a for a in across], 0)} % of the intervals, with other draws in {spread([100 * w for w in within], 0)} %"
        return here, sign([a - w for a, w in zip(across, within)])

    return judge


def gaps(*pairs: tuple[str, str], margin: float = 0.0, cheaper: bool = False) -> Callable[[Rows, str], Verdict]:
    """Mean quality and operations of the stitches that cross a gap, and whether the first of a pair is better than the other;
    than the other less `margin` points, where as good is enough; and, with `cheaper`, takes fewer operations."""

    def inner(row: Row, what: str) -> float:
        own = [s for s in row["stitches"] if s["gap"]]
        return statistics.mean(row.metric[s["key"]] if what == "quality" else s["macs"] for s in own)

    def judge(rows: Rows, task: str) -> Verdict:
        parts, found = [], []
        for name, other in pairs:
            difference = rows.differences(name, other, lambda row: inner(row, "quality"))
            times = inner(rows[name][0], "macs") / inner(rows[other][0], "macs")
            values = spread(rows.each(name, lambda row: inner(row, "quality")))
            parts.append(f"{name} {values}, {spread(difference)} over {other} at {times:.2f} times its operations")
            verdict = sign([value + margin for value in difference])
            found.append("does not" if cheaper and times >= 1 else verdict)
        return "; ".join(parts), several(found)

    return judge


def counted(rows: Rows, task: str) -> Verdict:
    import counts

    printed = [(published, ours) for _, _, published, ours, _ in counts.rows() if published == published]
    close = sum(abs(ours / published - 1) < 0.02 for published, ours in printed)
    return f"{close} of {len(printed)} within 2 %; each, with its reason, in results/counts.txt", (
        "holds" if close == len(printed) else "only in part"
    )


def equal_time(*pairs: tuple[str, str]) -> Callable[[Rows, str], Verdict]:
    """Each pair is two settings that took as long, all stages counted: SN-Net adapts its anchors first."""

    def judge(rows: Rows, task: str) -> Verdict:
        found = [better(one, other)(rows, task) for one, other in pairs]
        return "; ".join(here for here, _ in found), several([verdict for _, verdict in found])

    return judge
