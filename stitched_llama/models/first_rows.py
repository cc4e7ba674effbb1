"""Massive activations: the first token of a row of text, whose residual stream can be hundreds of times the others'.

Measured on SmolLM2-135M, where a fit that such rows own loses the attention sink or everything else.
"""

import torch
from torch import Tensor

_MASSIVE = 4.0  # times the median norm of the other rows
_KEPT_NORM = 8.0  # of the same: enough to stay an attention sink, small enough to leave the other rows alone


def relative_weights(y: Tensor) -> Tensor:
    """[rows]: weights under which each row's error counts relative to the norm of its target y [rows, width]."""
    squares = y.double().square().sum(-1)
    return 1 / squares.clamp_min(1e-6 * squares.median().clamp_min(torch.finfo(torch.float64).tiny))


class FirstRows:
    """The mean of massive first rows on both sides of a junction.

    Args:
        norm: the median norm of the target's other rows.
    """

    def __init__(self, norm: float):
        self.norm, self.count = norm, 0
        self.x_sum: Tensor | float = 0.0
        self.y_sum: Tensor | float = 0.0

    @classmethod
    def of(cls, y: Tensor, kept: Tensor, rest: Tensor) -> "FirstRows | None":
        """None where the first rows of y [batch, positions, width] are not massive; `kept` and `rest` are its rows with and without
        them."""
        norms = y.double().norm(dim=-1)
        first, others = norms[(kept & ~rest).to(y.device)], norms[rest.to(y.device)]
        if not len(first) or not len(others) or float(first.median()) <= _MASSIVE * float(others.median()):
            return None
        return cls(float(others.median()))

    def add(self, x: Tensor, y: Tensor, first: Tensor) -> None:
        """Adds the rows `first` [batch, positions] of x and y."""
        self.count += int(first.sum())
        self.x_sum = self.x_sum + x[first.to(x.device)].double().sum(0)
        self.y_sum = self.y_sum + y[first.to(y.device)].double().sum(0)

    @property
    def x(self) -> Tensor:
        """[in_width], the mean of the source's first rows."""
        return torch.as_tensor(self.x_sum) / self.count

    @property
    def target(self) -> Tensor:
        """[out_width], the direction of the target's first rows at a norm that other rows can bear."""
        return torch.nn.functional.normalize(torch.as_tensor(self.y_sum), dim=0) * _KEPT_NORM * self.norm
