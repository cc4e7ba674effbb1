"""How a claim about the curve of a setting is judged: its shape, its anchors, the order of its sizes. Quality is in points of 100."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from judgements import Verdict, better, several, sign
from rows import Row, Rows, line, spread

from stitched_llama.training import spearman


def shape(rows: Sequence[Row]) -> tuple[str, float, float]:
    """How far the stitches of some runs lie on a line between the anchors, the lowest Spearman, and the mean distance."""
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
    return here, min(ranks), statistics.mean(off)


def _part(lowest: float, off: float) -> str:
    """On the line within 3 points and ascending; ascending more than not; neither."""
    return "holds" if lowest >= 0.9 and off >= -3 else "only in part" if lowest >= 0.5 else "does not"


def interpolate(*names: str, peer: str | None = None) -> Callable[[Rows, str], Verdict]:
    """The shape of the curve of each setting, and how far the first's lies above a peer's."""

    def judge(rows: Rows, task: str) -> Verdict:
        parts, found = [], []
        for name in names:
            here, *measures = shape(rows[name])
            parts.append(f"{name}: {here}")
            found.append(_part(*measures))
        if peer:
            text, verdict = better(names[0], peer)(rows, task)
            parts.append(text)
            found.append(verdict)
        return "; ".join(parts), several(found)

    return judge


def against_alone(rows: Rows, task: str) -> Verdict:
    here, worst = gaps_to_alone(rows, "default", "alone")
    return (
        f"{here} against its own run of as many steps, of which anchors share two thirds here",
        "holds" if worst >= -3 else "does not",
    )


def starving(own: str, name: str, *beside: str) -> Callable[[Rows, str], Verdict]:
    """By the mean over the seeds: one run of one anchor varies by as much as the bound. The anchors' own runs took, together, as
    long as the run of all stitches."""

    def judge(rows: Rows, task: str) -> Verdict:
        found = {setting: gaps_to_alone(rows, setting, own) for setting in (name, *beside)}
        here = "; ".join(f"{setting}: {text}" for setting, (text, _) in found.items())
        return here, "holds" if found[name][1] >= -3 else "does not"

    return judge


def gaps_to_alone(rows: Rows, name: str, own: str) -> tuple[str, float]:
    """Points of each anchor over its own run, and the worst anchor's, a mean over the seeds."""
    parts, worst = [], []
    for index in range(len(rows[name][0].anchors)):
        pairs = zip(rows[name], rows[own], strict=True)
        gaps = [row.metric[sorted(row.anchors)[index]] - alone.metric[str(index)] for row, alone in pairs]
        parts.append(f"anchor {index} {spread(gaps)}")
        worst.append(statistics.mean(gaps))
    return ", ".join(parts), min(worst)


def importance(name: str) -> Callable[[Rows, str], Verdict]:
    """Inside intervals of two and more stitches; rank by held-out metric decides, by held-out loss stands beside it, and how well
    the held-out rows repeat themselves: what one half of them says of the other bounds what any score can be told to know."""
    return lambda rows, task: _importance(rows[name])


def _importance(rows: Sequence[Row]) -> Verdict:
    ranks, by_loss, hits, regrets, halves, half_hits = [], [], [], [], [], []
    for row in rows:
        inside, losses, right, regret, half, half_right = [], [], [], [], [], []
        here, there = row["halves"]
        for group in row.intervals():
            known = [s for s in group if s["importance"] is not None]
            if len(known) < 2:
                continue
            quality, scores = [row.metric[s["key"]] for s in known], [s["importance"] for s in known]
            inside.append(spearman(scores, quality))
            losses.append(spearman(scores, [-row["loss"][s["key"]] for s in known]))
            chosen = quality[scores.index(max(scores))]
            right.append(chosen == max(quality))
            regret.append(max(quality) - chosen)
            one, other = ([part[s["key"]] for s in known] for part in (here, there))
            half.append(spearman(one, other))
            half_right.append(other[one.index(max(one))] == max(other))
        inside, half = ([rank for rank in own if rank == rank] for own in (inside, half))  # none where all are equal
        if not inside:
            return "too few draws to tell", "open"
        lists = (ranks, by_loss, hits, regrets, halves, half_hits)
        for values, own in zip(lists, (inside, losses, right, regret, half, half_right)):
            values.append(statistics.mean(own or [0.0]))
    text = (
        f"Spearman inside intervals {spread(ranks, 2)} ({spread(by_loss, 2)} with the loss); best of its interval "
        f"{spread([100 * h for h in hits], 0)} %; regret {spread(regrets)}; one half of the held-out rows ranks the other "
        f"with {spread(halves, 2)}, so that the truth itself would reach {_ceiling(statistics.mean(halves)):.2f} on all, and "
        f"finds its best in {spread([100 * h for h in half_hits], 0)} %"
    )
    return text, "holds" if statistics.mean(ranks) >= 0.6 and statistics.mean(hits) >= 0.8 else "does not"


def _ceiling(halves: float) -> float:
    """Correlation of the truth with what all rows measure, from that of one half of them with the other (Spearman, Brown)."""
    return (2 * halves / (1 + halves)) ** 0.5 if halves > 0 else 0.0


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
    text, verdict = better("apart, aligned", "apart")(rows, task)
    return f"{here}; after the fine-tune {text}", f"{sign(lifted)} / {verdict}"


def monotone(rows: Rows, task: str) -> Verdict:
    counts = [row.falls(half) for row in rows["default"] for half in (0, 1)]
    pairs, worse, beyond = (sum(values) for values in zip(*counts))
    if not pairs:
        return "one size alone is published, by every half of the rows of every seed: nothing to compare", "open"
    here = f"of {pairs} pairs of published sizes the larger is worse in {worse}, in {beyond} of them beyond chance"
    return here, "does not" if beyond else "holds"
