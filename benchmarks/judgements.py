"""How a claim is judged where settings are compared, seed by seed; `curves.py` judges the curves of one.

A comparison is paired by seed. It `holds` where the difference has the claimed sign in every seed and its mean is beyond chance (one-sided
t-test, 5 %), `does not` where the same is true of the other sign, and is `open` otherwise: of comparisons without any difference one in
ten still gets a verdict. What is compared is the dial; where no run of either setting publishes anything but anchors, the dial is
an anchor's, and the mean of all sizes decides. Quality is in points of 100.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

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


def better(name: str, *others: str) -> Callable[[Rows], Verdict]:
    """`name` above each of `others`; dial, mean of all sizes and what trains stand there."""
    return together(*(lambda rows, other=other: _compared(rows, name, other) for other in others))


def _compared(rows: Rows, name: str, other: str) -> Verdict:
    dial = rows.differences(name, other, lambda row: row.front)
    mean = rows.differences(name, other, lambda row: row.mean)
    times = rows[other][0]["trained"] / rows[name][0]["trained"]
    here = f"dial {spread(dial)}, all {spread(mean)} over {other}"
    here += "" if abs(times - 1) < 0.005 else f" with {times:.2f} times as much to train"
    here += "" if _publish_stitches(rows, name, other) else " (anchors alone are published)"
    return here if name == "default" else f"{name}: {here}", sign(_deciding(rows, name, other))


def _deciding(rows: Rows, name: str, other: str) -> list[float]:
    """Points of `name` over `other` by what decides, seed by seed."""
    published = _publish_stitches(rows, name, other)
    return rows.differences(name, other, lambda row: row.front if published else row.mean)


def _publish_stitches(rows: Rows, *names: str) -> bool:
    return any(row.publishes_stitches for name in names for row in rows[name])


def start(rows: Rows) -> Verdict:
    """Held-out loss of all sizes before any training, then the dial after it."""
    fitted, drawn = (rows.each(name, lambda row: statistics.mean(row["loss"].values())) for name in ("fitted", "drawn"))
    here, verdict = better("default", "kaiming")(rows)
    before = f"before training, loss of all {spread(fitted, 2)} and {spread(drawn, 2)} with kaiming"
    lower = sign([other - value for value, other in zip(fitted, drawn, strict=True)])
    return f"{before}; after it {here}", f"{lower} / {verdict}"


def factor(index: int) -> Callable[[Rows], Verdict]:
    """One factor of the three at a time, the other two held: the mean difference of the four pairs, by the dial where any of the
    eight settings publishes a stitch."""

    def pairs() -> Iterator[tuple[str, str, str]]:
        """What is held, and the two settings."""
        level = next(iter(FACTORS))[index]
        for names in FACTORS:
            if names[index] == level:
                held = names[:index] + names[index + 1 :]
                other = next(n for n in FACTORS if n[index] != level and n[:index] + n[index + 1 :] == held)
                yield "+".join(held), FACTORS[names], FACTORS[other]

    def judge(rows: Rows) -> Verdict:
        def effect(measure: Callable[[Row], float]) -> tuple[list[float], str]:
            each = {held: rows.differences(name, other, measure) for held, name, other in pairs()}
            told = ", ".join(f"{held} {spread(values)}" for held, values in each.items())
            return [statistics.mean(values) for values in zip(*each.values())], told

        (dial, each), (mean, each_mean) = effect(lambda row: row.front), effect(lambda row: row.mean)
        here = f"{spread(dial)} on the dial ({each}), {spread(mean)} of all ({each_mean})"
        if alone := [name for name in FACTORS.values() if not _publish_stitches(rows, name)]:
            here += f"; anchors alone are published by {', '.join(alone)}"
        return here, sign(dial if len(alone) < len(FACTORS) else mean)

    return judge


def cost(rows: Rows) -> Verdict:
    """Quality of the default against SN-Net's in one stage, then in its own three, of as many steps without those of the anchors;
    memory of training and numbers that train against the former."""
    parts, peer = [], "snnet, one stage"
    for name in ("default", "esta", peer, "snnet"):
        one = rows[name]
        memory = [row["memory_mb"] for row in one if row["memory_mb"] is not None]
        parts.append(
            f"{name}: {one[0]['settings']['max_steps']} steps, {one[0]['trained']:,} train, {spread(memory, 0) if memory else '-'} MB, "
            f"{spread([r['train_seconds'] for r in one], 0)} s, dial {spread([r.front for r in one])}"
        )
    quality = [_compared(rows, "default", other)[1] for other in (peer, "snnet")]
    less = rows.differences(peer, "default", lambda row: row["memory_mb"] or 0.0)
    fewer = rows.differences(peer, "default", lambda row: row["trained"])
    return "; ".join(parts), " / ".join([*quality, sign(less), sign(fewer)])


def alike(name: str, *others: Sequence[str]) -> Callable[[Rows], Verdict]:
    """That `name` is as good as each of others, which is the best by the mean of several settings: not where the difference is
    beyond chance, open where it is 2 points or more nevertheless."""

    def judge(rows: Rows) -> Verdict:
        parts, found = [], []
        for peers in others:
            best = max(peers, key=lambda peer: statistics.mean(rows.each(peer, lambda row: row.front)))
            here, verdict = _compared(rows, name, best)
            near = abs(statistics.mean(_deciding(rows, name, best))) < 2
            parts.append(here)
            found.append("does not" if verdict != "open" else "holds" if near else "open")
        return "; ".join(parts), several(found)

    return judge


def together(*judges: Callable[[Rows], Verdict]) -> Callable[[Rows], Verdict]:
    """Several judgements of one claim."""

    def judge(rows: Rows) -> Verdict:
        found = [one(rows) for one in judges]
        return "; ".join(here for here, _ in found), several([verdict for _, verdict in found])

    return judge


def ascending(*names: str) -> Callable[[Rows], Verdict]:
    """Each setting above the one before it, by the dial."""

    def judge(rows: Rows) -> Verdict:
        dials = [rows.each(name, lambda row: row.front) for name in names]
        here = ", ".join(f"{name} {spread(values)}" for name, values in zip(names, dials))
        steps = [[b - a for a, b in zip(low, high, strict=True)] for low, high in zip(dials, dials[1:])]
        return here, several([sign(step) for step in steps])

    return judge


def angles(rows: Rows) -> Verdict:
    """Larger angles, and more pairs that pull apart."""
    parts, found = [], []
    for name in ("angles, target", "angles, source"):
        mean, above = ([row["angles"][what] for row in rows[name]] for what in ("mean", "above_90"))
        parts.append(f"{name.split(', ')[1]} {spread(mean)}°, {spread([100 * a for a in above], 0)} % above 90°")
        found.append((mean, above))
    return "; ".join(parts), " / ".join(sign([a - b for a, b in zip(*pair)]) for pair in zip(*found))


def differ(name: str, other: str, *same: str) -> Callable[[Rows], Verdict]:
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

    def judge(rows: Rows) -> Verdict:
        across = list(map(share, rows[name], rows[other]))
        within = [statistics.mean(values) for values in zip(*(map(share, rows[name], rows[peer]) for peer in same))]
        here = f"another stitch in {spread([100 * a for a in across], 0)} % of the intervals, with other draws in {spread([100 * w for w in within], 0)} %"
        return here, sign([a - w for a, w in zip(across, within)])

    return judge


def gaps(*pairs: tuple[str, str], margin: float = 0.0, cheaper: bool = False) -> Callable[[Rows], Verdict]:
    """Mean quality and operations of the stitches that cross a gap, and whether the first of a pair is better than the other;
    than the other less `margin` points, where as good is enough; and, with `cheaper`, takes fewer operations."""

    def inner(row: Row, what: str) -> float:
        own = [s for s in row["stitches"] if s["gap"]]
        return statistics.mean(row.accuracy[s["key"]] if what == "quality" else s["macs"] for s in own)

    def judge(rows: Rows) -> Verdict:
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


def counted(rows: Rows) -> Verdict:
    import counts

    printed = [(published, ours) for _, _, published, ours, _ in counts.rows() if published == published]
    close = sum(abs(ours / published - 1) < 0.02 for published, ours in printed)
    return f"{close} of {len(printed)} within 2 %; each, with its reason, in results/counts.txt", (
        "holds" if close == len(printed) else "only in part"
    )


def equal_time(*pairs: tuple[str, str]) -> Callable[[Rows], Verdict]:
    """Each pair is two settings that were to take as long, all stages counted: SN-Net adapts its anchors first."""

    def seconds(rows: Rows, name: str) -> list[float]:
        adapted = rows[name][0]["run"]["adapted"]
        own = rows.each(name, lambda row: row["train_seconds"])
        return [a + b for a, b in zip(own, seconds(rows, adapted))] if adapted else own

    def judge(rows: Rows) -> Verdict:
        parts, found = [], []
        for one, other in pairs:
            here, verdict = better(one, other)(rows)
            times = " to ".join(spread(seconds(rows, name), 0) for name in (one, other))
            parts.append(f"{here}, {times} s")
            found.append(verdict)
        return "; ".join(parts), several(found)

    return judge
