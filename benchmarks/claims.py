"""The claims of the papers and of this package: what each says, the runs it needs, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from judgements import (
    FACTORS,
    Rows,
    Verdict,
    against_alone,
    angles,
    better,
    cost,
    eta,
    factor,
    importance,
    interpolates,
    monotone,
    ranks,
    shots,
    start,
    starving,
)
from studies import Run

BOTH = ("language", "vision")


@dataclass(frozen=True)
class Claim:
    """A claim, what its paper says, the settings it needs, and the judgement."""

    letter: str
    text: str
    paper: str
    settings: Callable[[str], dict[str, dict[str, Any]]]
    judge: Callable[[Rows, str], Verdict]
    tasks: tuple[str, ...] = BOTH

    def runs(self, task: str) -> list[Run]:
        return [Run(task=task, name=name, seed=0, **settings) for name, settings in self.settings(task).items()]


def verdicts(claims: Sequence[Claim], rows: Rows, task: str) -> list[dict[str, str]]:
    """One line a claim."""
    found = []
    for claim in claims:
        here, verdict = claim.judge(rows, task)
        runs = sorted(claim.settings(task))
        found.append(
            {"letter": claim.letter, "claim": claim.text, "paper": claim.paper, "here": here, "verdict": verdict}
            | {"runs": ", ".join(runs)}
        )
    return found


# ---- settings: every one is this package's default but for what it names

FULL = {"pst": {"full": True}}
SN_NET = {
    "pst": {"full": True}, "adapted": "alone full",
    "training": {"sampling": "uniform", "inplace_teacher": False, "distillation": "none"},
}  # fmt: skip


def _settings(*names: str) -> Callable[[str], dict[str, dict[str, Any]]]:
    def of(task: str) -> dict[str, dict[str, Any]]:
        ranks = {"vision": ((8, 4, 2), (20, 16, 16), (32, 16, 8)), "language": (8, 18, 32)}[task]
        no_teaching = {"training": {"distillation": "none"}}
        known: dict[str, dict[str, Any]] = {
            "default": {"before": task == "language"},
            "esta": {"training": {"sampling": "esta", "importance": "snip"}},
            "snnet": SN_NET,
            "snnet, equal time": SN_NET | {"training": SN_NET["training"] | {"equal_time_of": "snnet"}},
            "sandwich": {"training": {"sandwich": True}},
            "uniform": {"training": {"sampling": "uniform"}},
            "interval": {"training": {"sampling": "interval"}},
            "no distillation": no_teaching,
            "kaiming": {"init": "kaiming", "before": task == "language"},
            "mean": {"init": "mean", "before": task == "language"},
            "no bias": {"pst": {"stitch_bias": False}},
            "no bias, scaled rank": {"pst": {"stitch_bias": False, "rank": ranks[1]}},
            "rank half": {"pst": {"rank": ranks[0]}},
            "rank double": {"pst": {"rank": ranks[2]}},
            "full": FULL,
            "full, no distillation": FULL | no_teaching,
            "adapted": {"adapted": "alone"},
            "adapted, no distillation": {"adapted": "alone"} | no_teaching,
            "adapted full": FULL | {"adapted": "alone full"},
            "adapted full, no distillation": FULL | {"adapted": "alone full"} | no_teaching,
            "eta 0.8": {"training": {"eta": 0.8}},
            "eta 0.99": {"training": {"eta": 0.99}},
            "shots 1": {"shots": 1},
            "shots 4": {"shots": 4},
            "shots 16": {"shots": 16},
            "stitching layers only": {"pst": {"rank": 0, "stitching_rank": "full", "stitch_bias": False}},
            "slow to fast": {"space": {"direction": "slow-to-fast"}},
            "any pairs": {"space": {"pairs": "any"}},
            "kernel 1": {"space": {"kernel_size": 1}},
            "kernel 3": {"space": {"kernel_size": 3}},
            "angles, target": FULL | {"angles": True},
            "angles, source": FULL | {"angles": True, "source": True},
            "alone": {"kind": "alone"},
            "alone full": {"kind": "alone"} | FULL,
        }  # fmt: skip
        return {name: known[name] for name in names}

    return of


CLAIMS = (
    Claim("a", "stitches interpolate between the anchors", "Figs 3, 4: smooth curves", _settings("default"), interpolates),
    Claim("b", "least squares beats Kaiming; `joint` beats `mean`", "SN-Net Fig 8", _settings("default", "kaiming", "mean"), start),
    Claim("c1", "PST beats full fine-tuning", "ESTA Fig 6a: yes", _settings(*FACTORS.values(), "alone", "alone full"), factor(0)),
    Claim("c2", "one stage beats three", "ESTA Fig 6d: yes", _settings(*FACTORS.values(), "alone", "alone full"), factor(1)),
    Claim("c3", "in-place distillation helps", "ESTA Fig 9b: a little", _settings(*FACTORS.values(), "alone", "alone full"), factor(2)),
    Claim("c4", "ESTA is cheaper than SN-Net and better", "4.6 M of 124.2 M, 9.7 of 13.2 GB", _settings("default", "snnet", "alone full"), cost),
    Claim("d", "stitches keep up with anchors tuned alone by LoRA", "Figs 3, 4: yes", _settings("default", "alone"), against_alone),
    Claim("e", "the bias a stitch beats none, and a scaled rank", "ESTA Fig 6b: yes", _settings("default", "no bias", "no bias, scaled rank"), better("default", "no bias", "no bias, scaled rank")),
    Claim("f1", "sampling by importance beats uniform draws", "ESTA Fig 6c: yes", _settings("default", "esta", "uniform", "interval"), better("default", "uniform", "interval")),
    Claim("f2", "the same as the paper writes it", "ESTA Fig 6c: yes", _settings("esta", "uniform", "interval"), better("esta", "uniform", "interval")),
    Claim("f3", "eta .9 beats .8; .99 is as good", "ESTA Fig 9c: slightly", _settings("default", "eta 0.8", "eta 0.99"), eta),
    Claim("i", "the rank matters little", "ESTA Fig 7: barely", _settings("default", "rank half", "rank double"), ranks),
    Claim("j", "more shots, better stitches", "ESTA Fig 8", _settings("default", "shots 1", "shots 4", "shots 16"), shots, ("vision",)),
    Claim("k", "stitches' gradients conflict more on the target", "ESTA Figs 2, 13: yes", _settings("angles, target", "angles, source"), angles, ("vision",)),
    Claim("n1", "fast to slow beats slow to fast", "SN-Net Fig 9a: for most", _settings("default", "slow to fast"), better("default", "slow to fast")),
    Claim("n2", "nearest pairs beat any pair", "SN-Net Fig 9b: for most", _settings("default", "any pairs"), better("default", "any pairs"), ("vision",)),
    Claim("n3", "a window of 2 beats 1 and 3", "SN-Net 4: 2 (no figure)", _settings("default", "kernel 1", "kernel 3"), better("default", "kernel 1", "kernel 3"), ("vision",)),
    Claim("n4", "more than the stitching layers must train", "SN-Net Fig 9c: yes", _settings("default", "stitching layers only"), better("default", "stitching layers only")),
    Claim("S1", "importance ranks stitches drawn uniformly as quality does", "ours: Spearman >= .6, 4 of 5", _settings("uniform"), importance),
    Claim("S2", "no anchor starves: within 3 points of its own run", "ours", _settings("default", "sandwich", "alone"), starving),
    Claim("S3", "the dial never goes down beyond chance", "ours", _settings("default"), monotone),
    Claim("S4", "the default beats ESTA as written and SN-Net in equal time", "ours: in every seed", _settings("default", "esta", "snnet", "snnet, equal time", "alone full"), better("default", "esta", "snnet, equal time")),
)  # fmt: skip
