"""Streamed least squares: O(width^2) memory for any number of tokens."""

from dataclasses import replace

import torch

from .stitching import Fit


class LeastSquares:
    """Accumulates token features X and Y as Gram matrices in float64 and solves once, with bias and a relative ridge.

    Adding the features of several junctions to one accumulator minimises the sum of their residuals.

    Args:
        in_width, out_width: features of X and Y.
        device: of the sums.
    """

    def __init__(self, in_width: int, out_width: int, device: torch.device | str = "cpu"):
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.rows = 0
        self.weight_sum = zeros()
        self.xx, self.xy = zeros(in_width, in_width), zeros(in_width, out_width)
        self.x_sum, self.y_sum, self.y_squares = zeros(in_width), zeros(out_width), zeros(out_width)

    @torch.no_grad()
    def add(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Adds rows x [rows, in_width], y [rows, out_width]; `weights` [rows] scale their squared residuals.

        Raises:
            ValueError: x and y have different numbers of rows.
        """
        if len(x) != len(y):
            raise ValueError(f"{len(x)} rows of X against {len(y)} of Y: they must be activations of the same tokens")
        device = self.xx.device
        x, y = x.to(device, torch.float64), y.to(device, torch.float64)
        weights = (
            torch.ones(len(x), dtype=torch.float64, device=device) if weights is None else weights.to(device).double()
        )
        weighted = x * weights[:, None]
        self.rows += len(x)
        self.weight_sum += weights.sum()
        self.xx += weighted.T @ x
        self.xy += weighted.T @ y
        self.x_sum += weighted.sum(0)
        self.y_sum += weights @ y
        self.y_squares += weights @ y.square()

    def pinned(self, fit: Fit, x: torch.Tensor, y: torch.Tensor, ridge: float = 1e-4) -> Fit:
        """A solution changed by a matrix of rank 1 so that it maps x [in_width] to y [out_width], with the least change of its output on
        the rows added here.

        For a vector far from these rows, such as the massive activation of a first token.
        """
        x, y = x.to(self.xx), y.to(self.xx)
        mean = self.x_sum / self.weight_sum
        covariance = self.xx / self.weight_sum - torch.outer(mean, mean)
        covariance.diagonal().add_(ridge * covariance.diagonal().mean())
        away = _solve(covariance, (x - mean)[:, None])[:, 0]
        away = away / ((x - mean) @ away)
        change = y - (fit.weight @ x + fit.bias)
        return replace(fit, weight=fit.weight + torch.outer(change, away), bias=fit.bias - (mean @ away) * change)

    def solve(self, ridge: float = 1e-4) -> Fit:
        """The affine map of least squared residual, in float64, with the moments of X and Y.

        Args:
            ridge: added to the diagonal of X's covariance, relative to its mean.

        Raises:
            ValueError: no rows were added, or they are not finite.
        """
        if self.rows == 0:
            raise ValueError(
                "no activations to fit: calibrate needs at least one batch with a token that is not padding"
            )
        x_mean, y_mean = self.x_sum / self.weight_sum, self.y_sum / self.weight_sum
        covariance = self.xx / self.weight_sum - torch.outer(x_mean, x_mean)
        cross = self.xy / self.weight_sum - torch.outer(x_mean, y_mean)
        if not (covariance.isfinite().all() and cross.isfinite().all()):
            raise ValueError(
                "the activations hold NaN or infinity: load the anchors in float32 or bfloat16, not float16"
            )
        x_variance, y_variance = covariance.diagonal().clone(), self.y_squares / self.weight_sum - y_mean.square()
        scale = covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        covariance.diagonal().add_(ridge * scale)
        weight = _solve(covariance, cross) if ridge else _least(covariance, cross)
        bias = y_mean - weight.T @ x_mean
        return Fit(weight.T.contiguous(), bias, x_mean, x_variance.clamp_min(0), y_mean, y_variance.clamp_min(0))


def _solve(covariance: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        inverse: torch.Tensor = torch.linalg.pinv(covariance, hermitian=True)
        return inverse @ cross
    return torch.cholesky_solve(cross, factor)


def _least(covariance: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """The minimum-norm solution for linearly dependent features; on the CPU, as the GPU solver needs full rank."""
    solution: torch.Tensor = torch.linalg.lstsq(covariance.cpu(), cross.cpu(), driver="gelsd").solution
    return solution.to(cross)


class Residual:
    """Streamed R2 of a prediction: 1 - residual / variance, over all features of the target together."""

    def __init__(self) -> None:
        self.rows = 0
        self.weight_sum = self.residual = self.squares = 0.0
        self.total: torch.Tensor | float = 0.0

    @torch.no_grad()
    def add(self, predicted: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Adds rows [rows, features] of both; `weights` [rows] scale their squares."""
        predicted, target = predicted.double(), target.double().to(predicted.device)
        weights = torch.ones(len(target)).to(target) if weights is None else weights.to(target)
        self.rows += len(target)
        self.weight_sum += float(weights.sum())
        self.residual += float(weights @ (target - predicted).square().sum(-1))
        self.squares += float(weights @ target.square().sum(-1))
        self.total = self.total + weights @ target

    @property
    def r2(self) -> float:
        """R2, or NaN before the first row."""
        if self.rows == 0:
            return float("nan")
        variance = self.squares - float(torch.as_tensor(self.total).square().sum()) / self.weight_sum
        return 1.0 - self.residual / variance if variance > 0 else float("nan")
