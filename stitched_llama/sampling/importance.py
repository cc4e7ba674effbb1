"""Importance of a stitch from one training step: a small registry of scores and their moving averages.

A larger score means a more important stitch; `snip` is the paper's. `excess_loss`, the loss relative to the teacher's on the same
batch, correlated best with held-out loss (LOG.md), as it does not depend on how hard a batch is. Averaged over many steps it
separates stitches of an interval that differ much, not neighbours of almost equal held-out loss (claims S1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepSignals:
    """Measurements of one training step of a stitch.

    Attributes:
        saliency: sum of |gradient * weight| over the stitch's trainable tensors (SNIP).
        gradient_norm: Euclidean norm of those gradients.
        loss: the stitch's training loss, nats a token or image.
        teacher_loss: the teacher's loss on the same rows; 0 without a teacher.
    """

    saliency: float
    gradient_norm: float
    loss: float
    teacher_loss: float = 0.0


_TINY = 1e-12
SCORES: dict[str, Callable[[StepSignals], float]] = {
    "snip": lambda s: s.saliency,
    "snip_per_gradient": lambda s: s.saliency / (s.gradient_norm + _TINY),
    "snip_per_loss": lambda s: s.saliency / (s.loss**2 + _TINY),
    "loss": lambda s: -s.loss,
    "excess_loss": lambda s: s.teacher_loss - s.loss,
}


@dataclass
class Importance:
    """Moving averages of a score, one a stitch (ESTA equation 3), with Adam's bias correction.

    Args:
        score: a name in `SCORES`.
        eta: momentum of the average.
        averages: key -> moving average.
        visits: key -> updates so far.

    Raises:
        ValueError: the score is unknown or eta is outside [0, 1).
    """

    score: str = "excess_loss"
    eta: float = 0.9
    averages: dict[str, float] = field(default_factory=dict)
    visits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"importance {self.score!r} is unknown; one of {', '.join(SCORES)} is needed")
        if not 0 <= self.eta < 1:
            raise ValueError(f"eta is {self.eta}; a moving average needs 0 <= eta < 1")

    def update(self, key: str, signals: StepSignals) -> None:
        """Updates the average of stitch `key`: the first value is the average, the n-th has a weight of at least 1 / n.

        A score that is not finite is ignored, as gradients may overflow under float16.
        """
        value, visits = SCORES[self.score](signals), self.visits.get(key, 0) + 1
        if not math.isfinite(value):
            return
        old = self.averages.get(key, value)
        # averages of an older bundle have no count and are treated as a long history
        counted = visits > 1 or key not in self.averages
        self.averages[key] = old + (1 - self.eta) / (1 - self.eta**visits if counted else 1) * (value - old)
        self.visits[key] = visits
