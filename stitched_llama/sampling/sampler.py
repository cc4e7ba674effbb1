"""Samples the stitch of a training step: a pure function of (seed, step) and the importance averages."""

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from stitched_llama.space import Stitch, intervals

SCHEMES = ("importance", "esta", "interval", "uniform")


@dataclass(frozen=True)
class StitchSampler:
    """Samples the student of each step; all ranks sample the same one without communication.

    Schemes: `uniform` over all stitches (SN-Net); `interval`, a cost interval uniformly, then a stitch in it uniformly;
    `esta`, a cost interval, then softmax of raw importance (ESTA section 4.2); `importance` (default), a cost interval,
    then softmax of importance z-scores within it, with a floor for every stitch. With any scheme a share of the steps may be reserved
    for the anchors; the other steps are sampled among all stitches, including anchors.

    Args:
        stitches: those that train, ascending in parameters.
        scheme: one of `SCHEMES`.
        interval_count: equal parts of the parameter range (ESTA: 6 for LLaMA, about 15 for ViT).
        warmup_steps: steps sampled uniformly at first, to fill the averages.
        floor: share of the samples that is uniform over the stitches of an interval (`importance` only).
        anchor_share: share of the steps reserved for the anchors, uniform over them.
        always: keys of anchors without reserved steps, as they train at every step or have no trainable parameters.
        seed: of all samples.

    Raises:
        ValueError: no stitches, an unknown scheme, or a share outside [0, 1].
    """

    stitches: Sequence[Stitch]
    scheme: str = "importance"
    interval_count: int = 6
    warmup_steps: int = 0
    floor: float = 0.5
    anchor_share: float = 0.0
    seed: int = 0
    always: Collection[str] = ()

    def __post_init__(self) -> None:
        if not self.stitches:
            raise ValueError("no stitches to draw from")
        if self.scheme not in SCHEMES:
            raise ValueError(f"sampling {self.scheme!r} is unknown; one of {', '.join(SCHEMES)} is needed")
        for name in ("floor", "anchor_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a share lies in 0..1")

    def draw(self, step: int, importance: Mapping[str, float]) -> str:
        """The key of the stitch of optimiser step `step` (from 0)."""
        rng = random.Random(f"{self.seed}/{step}")
        anchors = [stitch.key for stitch in self.stitches if stitch.is_anchor and stitch.key not in self.always]
        if anchors and rng.random() < self.anchor_share:
            return rng.choice(anchors)
        if self.scheme == "uniform" or (self.scheme != "interval" and step < self.warmup_steps):
            return rng.choice(self.stitches).key
        groups = intervals([stitch.params for stitch in self.stitches], self.interval_count)
        keys = [self.stitches[index].key for index in rng.choice(groups)]
        return rng.choices(keys, self._weights([importance.get(key) for key in keys]))[0]

    def _weights(self, scores: list[float | None]) -> list[float]:
        """Probabilities within an interval; a stitch without a score gets the mean score."""
        known = [score for score in scores if score is not None]
        if self.scheme == "interval" or not known:
            return [1.0] * len(scores)
        mean = sum(known) / len(known)
        filled = [mean if score is None else score for score in scores]
        if self.scheme == "importance":
            deviation = math.sqrt(sum((score - mean) ** 2 for score in known) / len(known)) or 1.0
            filled = [(score - mean) / deviation for score in filled]
        top = max(filled)
        raw = [math.exp(score - top) for score in filled]
        floor = self.floor if self.scheme == "importance" else 0.0
        return [floor / len(raw) + (1 - floor) * weight / sum(raw) for weight in raw]
