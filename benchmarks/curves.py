"""How a claim about the curve of a setting is judged: its shape, its anchors, the order of its sizes. Quality is in points of 100."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from judgements import Verdict, better, several
from rows import Row, Rows, line, spread

from stitched_llama.training import spearman


def shape(rows: Sequence[Row]) -> tuple[str, float, float]:
    """How far the stitches of some runs lie on a line between the anchors, the lowest Spearman, and the mean distance."""
    ranks, drops, off = [], [], []
    for row in rows:
        stitches, accuracy = row["stitches"], row.accuracy
        ranks.append(row["spearman"])
        values = [accuracy[s["key"]] for s in stitches]
        pairs = [(i, j) for i in range(len(values)) for j in range(i)]
        drops.append(sum(values[i] < values[j] for i, j in pairs) / len(pairs))
        ends = sorted((s["params"], accuracy[s["key"]]) for s in stitches if s["anchor"])
        inner = [s for s in stitches if not s["anchor"]]
        off.append(statistics.mean(accuracy[s["key"]] - line(ends, s["params"]) for s in inner))
    here = (
        f"Spearman {spread(ranks, 2)}; inverted pairs {spread([100 * d for d in drops])} %; {spread(off)} off the line"
    )
    return here, min(ranks), statistics.mean(off)


def _part(lowest: float, off: float) -> str:
    """On the line within 3 points and ascending; ascending more than not; neither."""
    return "holds" if lowest >= 0.9 and off >= -3 else "only in part" if lowest >= 0.5 else "does not"


def interpolate(*names: str, peer: str | None = None) -> Callable[[Rows], Verdict]:
    """The shape of the curve of each setting, and how far the first's lies above a peer's."""

    def judge(rows: Rows) -> Verdict:
        parts, found = [], []
        for name in names:
            here, *measures = shape(rows[name])
            parts.append(f"{name}: {here}")
            found.append(_part(*measures))
        if peer:
            text, verdict = better(names[0], peer)(rows)
            parts.append(text)
            found.append(verdict)
        return "; ".join(parts), several(found)

    return judge


def starving(own: str, name: str, *beside: str) -> Callable[[Rows], Verdict]:
    """No anchor of `name` more than 3 points behind its `own` run, by the mean over the seeds: one run of one anchor varies by as
    much as the bound. `beside` is told, not judged."""

    def judge(rows: Rows) -> Verdict:
        found = {setting: gaps_to_alone(rows, setting, own) for setting in (name, *beside)}
        here = "; ".join(f"{setting}: {text}" for setting, (text, _) in found.items())
        return here, "holds" if found[name][1] >= -3 else "does not"

    return judge


def gaps_to_alone(rows: Rows, name: str, own: str) -> tuple[str, float]:
    """Points of each anchor over its own run, and the worst anchor's, a mean over the seeds."""
    parts, worst = [], []
    for index in range(len(rows[name][0].anchors)):
        pairs = zip(rows[name], rows[own], strict=True)
        gaps = [row.accuracy[sorted(row.anchors)[index]] - alone.accuracy[str(index)] for row, alone in pairs]
        parts.append(f"anchor {index} {spread(gaps)}")
        worst.append(statistics.mean(gaps))
    return ", ".join(parts), min(worst)


def importance(name: str) -> Callable[[Rows], Verdict]:
    """Inside intervals of two and more stitches; rank by held-out accuracy decides, by held-out loss stands beside it, and how well
    the held-out rows repeat themselves: what one half of them says of the other bounds what any score can be told to know."""

    def judge(rows: Rows) -> Verdict:
        found = [_ranked(row) for row in rows[name]]
        if not all(found):
            return "too few draws to tell", "open"
        each = {what: [one[what] for one in found] for what in found[0]}
        shares = {what: spread([100 * value for value in values], 0) for what, values in each.items()}
        here = (
            f"Spearman inside intervals {spread(each['rank'], 2)} ({spread(each['rank of loss'], 2)} with the loss); best of its "
            f"interval {shares['best']} %; regret {spread(each['regret'])}; {shares['front']} % of its choices lie on the front of "
            f"the stitches it ranks, of which {shares['front of all']} % do; one half of the held-out rows ranks the other with "
            f"{spread(each['rank of half'], 2)}, so that the truth itself would reach "
            f"{_ceiling(statistics.mean(each['rank of half'])):.2f} on all, and finds its best in {shares['best of half']} %"
        )
        wanted = statistics.mean(each["rank"]) >= 0.6 and statistics.mean(each["best"]) >= 0.8
        return here, "holds" if wanted else "does not"

    return judge


def _ranked(row: Row) -> dict[str, float]:
    """What importance, and one half of the held-out rows, say of the stitches of an interval: means over the intervals; empty
    where too few stitches were drawn."""
    rated = [s for s in row["stitches"] if s["importance"] is not None]
    score, quality = {s["key"]: s["importance"] for s in rated}, row.accuracy
    less_loss = {key: -loss for key, loss in row["loss"].items()}
    here, there = row["halves"]
    groups = [[s["key"] for s in group if s["key"] in score] for group in row.intervals()]
    groups = [keys for keys in groups if len(keys) > 1]
    chosen = [max(keys, key=score.__getitem__) for keys in groups]
    front, best = set(), -1.0
    for stitch in sorted(rated, key=lambda s: (s["params"], -quality[s["key"]])):
        if quality[stitch["key"]] > best:
            best = quality[stitch["key"]]
            front.add(stitch["key"])

    def rank(one: dict, other: dict) -> float:
        found = [spearman([one[k] for k in keys], [other[k] for k in keys]) for keys in groups]
        return statistics.mean([value for value in found if value == value] or [0.0])  # none where all are equal

    def finds(one: dict, other: dict) -> float:
        return statistics.mean(other[max(keys, key=one.__getitem__)] == max(other[k] for k in keys) for keys in groups)

    if not groups:
        return {}
    return {
        "rank": rank(score, quality),
        "rank of loss": rank(score, less_loss),
        "best": finds(score, quality),
        "regret": statistics.mean(max(quality[k] for k in keys) - quality[c] for keys, c in zip(groups, chosen)),
        "front": statistics.mean(key in front for key in chosen),
        "front of all": len(front) / len(rated),
        "rank of half": rank(here, there),
        "best of half": finds(here, there),
    }


def _ceiling(halves: float) -> float:
    """Correlation of the truth with what all rows measure, from that of one half of them with the other (Spearman, Brown)."""
    return (2 * halves / (1 + halves)) ** 0.5 if halves > 0 else 0.0


def monotone(rows: Rows) -> Verdict:
    counts = [row.falls(half) for row in rows["default"] for half in (0, 1)]
    pairs, worse, beyond = (sum(values) for values in zip(*counts))
    if not pairs:
        return "one size alone is published, by every half of the rows of every seed: nothing to compare", "open"
    here = f"of {pairs} pairs of published sizes the larger is worse in {worse}, in {beyond} of them beyond chance"
    return here, "does not" if beyond else "holds"
