"""The claims of the papers and of this package: what each says, the runs it needs, and how it is judged.

A setting is what its runs do unlike this package's defaults; PAPERS.md says where the papers make each claim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from curves import importance, interpolate, monotone, starving
from judgements import (
    FACTORS,
    Verdict,
    alike,
    angles,
    ascending,
    better,
    cost,
    counted,
    differ,
    equal_time,
    factor,
    gaps,
    start,
    together,
)
from rows import Rows
from tasks import Run


@dataclass(frozen=True)
class Claim:
    """A claim, what its paper says, the settings it needs, the judgement, and what was tried where it does not hold."""

    letter: str
    text: str
    paper: str
    settings: dict[str, dict[str, Any]]
    judge: Callable[[Rows], Verdict]
    tried: str = ""

    def runs(self) -> list[Run]:
        return [Run(name, 0, **settings) for name, settings in self.settings.items()]


def verdicts(claims: Sequence[Claim], rows: Rows, seeds: int) -> list[dict[str, str]]:
    """One line a claim; one that lacks a row of a seed was not measured."""
    found = []
    for claim in claims:
        whole = all(len(rows[name]) == seeds for name in claim.settings)
        here, verdict = claim.judge(rows) if whole else ("", "not measured")
        if whole and claim.tried and verdict != "holds":
            here += f". Tried: {claim.tried}"
        found.append(
            {"letter": claim.letter, "claim": claim.text, "paper": claim.paper, "here": here, "verdict": verdict}
            | {"runs": ", ".join(sorted(claim.settings))}
            | {"command": f"python benchmarks/evidence.py --only {claim.letter}"}
        )
    return found


# ---- settings

FULL = {"pst": {"full": True}}
# SN-Net's way: all weights, one stitch a step, drawn evenly, no distillation
PLAIN = {"sampling": "uniform", "inplace_teacher": False, "anchor_share": 0.0, "distillation": "none"}
SN_NET = FULL | {"training": PLAIN}
# two routes a step and half the steps, none of them for an anchor alone
BESIDE = {"train_teacher": True, "anchor_share": 0.0, "max_steps": 450}
ESTA = {"training": BESIDE | {"sampling": "esta", "importance": "snip"}}
UNTAUGHT = {"training": {"distillation": "none"}}
# stitching layers alone, on what the anchors know: the fourth paper's way
GAP = {
    "family": "resnet-swin", "part": "source", "training": PLAIN | {"learning_rate": 2e-3, "max_steps": 300},
    "pst": {"rank": 0, "stitching_rank": "full", "stitch_bias": False},
}  # fmt: skip
# rates of the peers in LoRA's place
RATES = {
    "": {},
    ", lower rate": {"training": {"learning_rate": 2e-3}},
    ", higher rate": {"training": {"learning_rate": 1e-2}},
}
SHOTS = (1, 4, 8, 16)  # the paper's; the default's are ten
EVEN = {"sampling": "uniform", "anchor_share": 0.67}
LONGER = EVEN | {"max_steps": 2700}


def _gap(adapter: str, rescale: str) -> dict[str, Any]:
    return GAP | {"space": {"adapter": adapter, "rescale": rescale, "adapter_norm": "batch"}}


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"hits": True},
    # pictures the anchors' heads know
    "fitted": {"kind": "untrained", "part": "source"},
    "drawn": {"kind": "untrained", "part": "source", "init": "kaiming"},
    "default, as long as snnet": {"lasts": ("alone full", "snnet"), "rate_of": "default"},
    "esta": ESTA,
    "esta, equal time": ESTA | {"lasts": ("default",), "rate_of": "esta"},
    "esta, no distillation": {"training": ESTA["training"] | {"distillation": "none"}},
    "snnet": SN_NET | {"adapted": "alone full"},
    "snnet, one stage": SN_NET,
    "snnet, one stage, equal time": SN_NET | {"lasts": ("default",), "rate_of": "snnet, one stage"},
    "teacher beside, equal time": {"training": BESIDE, "lasts": ("default",), "rate_of": "esta"},
    "anchor share a third": {"training": {"anchor_share": 0.33}},
    "uniform": {"training": EVEN},
    "uniform, longer": {"training": LONGER},
    "uniform, longer, 60 shots": {"training": LONGER, "shots": 60},
    "interval": {"training": EVEN | {"sampling": "interval"}},
    "uniform, teacher beside": {"training": BESIDE | {"sampling": "uniform"}},
    "interval, teacher beside": {"training": BESIDE | {"sampling": "interval"}},
    "no distillation": UNTAUGHT,
    "soft distillation": {"training": {"distillation": "soft"}},
    "no floor": {"training": {"floor": 0.0}},
    "lower rate": {"training": {"learning_rate": 2e-3}},
    "higher rate": {"training": {"learning_rate": 1e-2}},
    "kaiming": {"init": "kaiming"},
    "mean": {"init": "mean"},
    "ridge 1e-2": {"ridge": 1e-2},
    "no bias": {"pst": {"stitch_bias": False}},
    # as many more numbers as the biases of all stitches; the default's ranks are 32, 16, 8
    "no bias, scaled rank": {"pst": {"stitch_bias": False, "rank": (32, 27, 14)}},
    "stitch lora": {"pst": {"stitch_bias": False}, "peer": "stitch lora"},
    "rank quarter": {"pst": {"rank": (8, 4, 2)}},
    "rank half": {"pst": {"rank": (16, 8, 4)}},
    **{
        name + ending: {"pst": {"rank": 0}, "peer": name} | rate
        for name in ("adapter", "adaptformer") for ending, rate in RATES.items()
    },
    "full": FULL,
    "full, no distillation": FULL | UNTAUGHT,
    "full, equal time": FULL | {"lasts": ("default",), "rate_of": "full"},
    "no distillation, equal time": UNTAUGHT | {"lasts": ("default",), "rate_of": "no distillation"},
    "default, as long as adapted": {"lasts": ("alone", "adapted"), "rate_of": "default"},
    "full, as long as adapted full": FULL | {"lasts": ("alone full", "adapted full"), "rate_of": "full"},
    "adapted": {"adapted": "alone"},
    "adapted, no distillation": {"adapted": "alone"} | UNTAUGHT,
    "adapted full": FULL | {"adapted": "alone full"},
    "adapted full, no distillation": FULL | {"adapted": "alone full"} | UNTAUGHT,
    "eta 0.8": {"training": {"eta": 0.8}},
    "eta 0.99": {"training": {"eta": 0.99}},
    **{f"shots {number}": {"shots": number} for number in SHOTS},
    **{f"shots {number}, alone": {"kind": "alone", "shots": number} for number in SHOTS},
    **{f"shots {number}, alone full": {"kind": "alone", "shots": number} | FULL for number in SHOTS},
    **{f"shots {n}, snnet": SN_NET | {"adapted": f"shots {n}, alone full", "shots": n} for n in SHOTS},
    "stitching layers only": {"pst": {"rank": 0, "stitching_rank": "full", "stitch_bias": False}, "training": PLAIN},
    "slow to fast": {"space": {"direction": "slow-to-fast"}},
    "any pairs": {"space": {"pairs": "any"}},
    "kernel 1": {"space": {"kernel_size": 1}},
    "kernel 3": {"space": {"kernel_size": 3}},
    "stride 2": {"space": {"kernel_size": 2, "stride": 2}},
    "angles, target": FULL | {"angles": True},
    "angles, source": FULL | {"angles": True, "part": "source"},
    "source": {"part": "source"},
    "convnext": {"family": "convnext"},
    "convnext, alone full": {"kind": "alone", "family": "convnext"} | FULL,
    "convnext, snnet": SN_NET | {"family": "convnext", "adapted": "convnext, alone full"},
    "gap linear": _gap("linear", "bilinear"),
    "gap conv3x3": _gap("conv3x3_relu", "bilinear"),
    "gap bottleneck": _gap("bottleneck", "bilinear"),
    "gap conv3x3 strided": _gap("conv3x3_relu", "strided"),
    "gap bottleneck strided": _gap("bottleneck", "strided"),
    "gap bottleneck undownsampled": _gap("bottleneck", "none"),
    "alone": {"kind": "alone"},
    "alone full": {"kind": "alone"} | FULL,
    "alone, equal cost": {"kind": "alone", "lasts": ("default",), "rate_of": "alone"},
}  # fmt: skip


def _settings(*names: str) -> dict[str, dict[str, Any]]:
    return {name: SETTINGS[name] for name in names}


_FACTORS = _settings(*FACTORS.values(), "alone", "alone full")
_SN_NET = ("default", "esta", "snnet", "snnet, one stage", "alone full")
_DRAWS = ("esta", "uniform, teacher beside", "interval, teacher beside")
_GAPS = ("gap linear", "gap conv3x3", "gap bottleneck", "gap conv3x3 strided", "gap bottleneck strided")
_RATES = ("lower rate", "higher rate")
_PEERS = [[name + ending for ending in RATES] for name in ("adapter", "adaptformer")]
_SHOTS = [f"shots {number}" for number in SHOTS]
_FEW = ("shots 1", "shots 4", "shots 8", "default", "shots 16")
_SN_NETS = (*_SHOTS, *(f"{name}, {peer}" for name in _SHOTS for peer in ("snnet", "alone full")))
_TIMED = (
    ("default", "full, equal time"),
    ("default, as long as adapted", "adapted"),
    ("full, as long as adapted full", "adapted full"),
    ("default", "no distillation, equal time"),
)
_BESIDE = ("teacher beside, equal time", "esta")  # the second tells how long a step of two routes takes
_REMEDIES = (
    "anchor share a third",
    "no distillation",
    "soft distillation",
    "no floor",
    *_RATES,
    "uniform",
    "mean",
    "ridge 1e-2",
)

CLAIMS = (
    Claim("a", "stitches interpolate between the anchors", "ESTA Figs 3, 4: smooth curves", _settings("default"), interpolate("default"), tried="2,700 steps (a3); the papers' ways (a4); soft labels, other rates, fewer steps for the anchors (S5)"),
    Claim("a3", "so they do after 2,700 steps, drawn evenly", "-", _settings("uniform, longer"), interpolate("uniform, longer")),
    Claim("a4", "so they do trained the papers' ways, in ESTA's steps and in SN-Net's three stages", "ESTA Figs 3, 4; SN-Net Fig 6", _settings("esta", "snnet", "alone full"), interpolate("esta", "snnet")),
    Claim("b1", "least squares beats Kaiming, before training and after", "SN-Net Fig 8: yes", _settings("fitted", "drawn", "default", "kaiming"), start),
    Claim("b2", "for shared layers `joint` beats `mean`", "ours; SN-Net: `mean`", _settings("default", "mean"), better("default", "mean")),
    Claim("c1", "PST beats full fine-tuning", "ESTA Fig 6a: yes", _FACTORS, factor(0), tried="three rates of PST, two and three of full (LOG.md); lower ranks (i1); equal time (c6)"),
    Claim("c2", "adapt-and-stitch beats the same run on adapted anchors (h)", "ESTA Fig 6d: yes", _FACTORS, factor(1), tried="equal time, as adapting takes twice as many steps more (c6)"),
    Claim("c3", "in-place distillation helps (g)", "ESTA Fig 9b: a little", _FACTORS, factor(2)),
    Claim("c4", "better than SN-Net in one stage and in three, in equal steps, for less memory and weights", "9.7 of 13.2 GB, 4.6 of 124.2 M", _settings(*_SN_NET), cost),
    Claim("c5", "in-place distillation helps ESTA as written", "ESTA Fig 9b: a little", _settings("esta", "esta, no distillation"), better("esta", "esta, no distillation")),
    Claim("c6", "PST, adapt-and-stitch (of PST, of full) and distillation earn their place in equal time", "ESTA Fig 6", _FACTORS | _settings(*(name for pair in _TIMED for name in pair)), equal_time(*_TIMED)),
    Claim("d", "anchors in the run keep up with anchors tuned alone by LoRA, in as many steps", "ESTA Figs 3, 4: on par", _settings("default", "alone"), starving("alone", "default"), tried="two steps of three are an anchor's (S2)"),
    Claim("e1", "the bias a stitch beats none, and a scaled rank", "ESTA Fig 6b: yes", _settings("default", "no bias", "no bias, scaled rank"), better("default", "no bias", "no bias, scaled rank"), tried="four times the rate for the biases (LOG.md): worse"),
    Claim("e2", "and a LoRA of each stitch's own", "ESTA Fig 6b: yes", _settings("default", "stitch lora"), better("default", "stitch lora")),
    Claim("f1", "drawing by importance beats even draws", "ESTA Fig 6c: yes", _settings("default", "uniform", "interval"), better("default", "uniform", "interval"), tried="no floor (S5); six scores (LOG.md)"),
    Claim("f2", "so it does in ESTA as written", "ESTA Fig 6c: yes", _settings(*_DRAWS), better(*_DRAWS)),
    Claim("f3", "eta .9 and .99 beat .8", "ESTA Fig 9c: slightly", _settings("default", "eta 0.8", "eta 0.99"), together(better("default", "eta 0.8"), better("eta 0.99", "eta 0.8"))),
    Claim("i1", "the rank matters little", "ESTA Fig 7: barely", _settings("rank quarter", "rank half", "default"), alike("default", ("rank half",), ("rank quarter",))),
    Claim("i2", "Adapter and AdaptFormer do as well as LoRA", "ESTA Fig 7: similar", _settings("default", *_PEERS[0], *_PEERS[1]), alike("default", *_PEERS), tried="three rates of each, the best stands here"),
    Claim("j", "more shots, better stitches", "ESTA Fig 8", _settings(*_FEW), ascending(*_FEW)),
    Claim("j2", "with 1, 4, 8 and 16 shots better than SN-Net", "ESTA Fig 8: yes", _settings(*_SN_NETS), together(*(better(name, f"{name}, snnet") for name in _SHOTS))),
    Claim("j3", "and anchors keep up with those tuned alone by LoRA", "ESTA Fig 8: on par", _settings(*_SHOTS, *(f"{name}, alone" for name in _SHOTS)), together(*(starving(f"{name}, alone", name) for name in _SHOTS))),
    Claim("k", "stitches' gradients conflict more on the target: larger angles, more beyond 90°", "ESTA Figs 2, 13: yes", _settings("angles, target", "angles, source"), angles),
    Claim("l", "the stitches that matter differ between tasks", "ESTA Fig 11: yes", _settings("default", "source", "uniform", "interval"), differ("default", "source", "uniform", "interval")),
    Claim("m", "ConvNeXt: a smooth curve, above SN-Net's", "ESTA Fig 9a: yes", _settings("convnext", "convnext, snnet", "convnext, alone full"), interpolate("convnext", peer="convnext, snnet")),
    Claim("n1", "fast to slow beats slow to fast", "SN-Net Fig 9a: for most", _settings("default", "slow to fast"), better("default", "slow to fast")),
    Claim("n2", "nearest pairs beat any pair", "SN-Net Fig 9b: for most", _settings("default", "any pairs"), better("default", "any pairs")),
    Claim("n3", "a window of 2 at stride 1 beats others", "SN-Net 4: 2 (no figure)", _settings("default", "kernel 1", "kernel 3", "stride 2"), better("default", "kernel 1", "kernel 3", "stride 2")),
    Claim("n4", "more than the stitching layers must train", "SN-Net Fig 9c: yes", _settings("snnet, one stage", "stitching layers only"), better("snnet, one stage", "stitching layers only")),
    Claim("o1", "across gaps 3x3 and bottleneck beat linear adapters", "Traft, Cheney Fig 2: yes", _settings(*_GAPS), gaps(("gap conv3x3", "gap linear"), ("gap bottleneck", "gap linear"))),
    Claim("o2", "a separate downsample is as good as a strided one", "Traft, Cheney Fig 2: better", _settings(*_GAPS), gaps(("gap conv3x3", "gap conv3x3 strided"), ("gap bottleneck", "gap bottleneck strided"), margin=1)),
    Claim("o3", "a bottleneck is as good as a 3x3, for fewer operations", "Traft, Cheney Fig 3: yes", _settings(*_GAPS, "gap bottleneck undownsampled"), gaps(("gap bottleneck", "gap conv3x3"), ("gap bottleneck", "gap bottleneck undownsampled"), margin=1, cheaper=True)),
    Claim("p", "parameters, operations and stitches are the papers'", "their tables", _settings(), counted),
    Claim("S1", "importance ranks stitches drawn evenly as quality does", "ours: Spearman >= .6, 4 of 5", _settings("uniform, longer"), importance("uniform, longer"), tried="six scores, averages corrected for their short history or not, of a hundred visits or ten, fewer steps, every stitch on the same rows (LOG.md); more pictures (S1b)"),
    Claim("S1b", "so it does with six times the pictures", "ours", _settings("uniform, longer, 60 shots"), importance("uniform, longer, 60 shots")),
    Claim("S2", "no anchor starves: within 3 points of its own run, equal cost", "ours", _settings("default", *_BESIDE, "alone", "alone, equal cost"), starving("alone, equal cost", "default", "teacher beside, equal time"), tried="their share of the steps; all routes in one step, a taught small anchor (LOG.md)"),
    Claim("S3", "the dial never goes down beyond chance", "ours", _settings("default"), monotone),
    Claim("S4", "the default beats ESTA and SN-Net in equal time", "ours: in every seed", _settings(*_SN_NET, "default, as long as snnet", "esta, equal time", "snnet, one stage, equal time"), equal_time(("default", "esta, equal time"), ("default, as long as snnet", "snnet"), ("default", "snnet, one stage, equal time")), tried="no distillation, soft labels, fewer steps for anchors, floor, draws, `mean`, ridge (S5); rates and ranks, all routes in one step, four times the rate for stitching layers (LOG.md)"),
    Claim("S5", "the default beats what else was tried", "ours", _settings("default", *_REMEDIES), better("default", *_REMEDIES)),
)  # fmt: skip
