"""The stitching layer of a junction: linear by default, or a convolutional adapter that may change the resolution."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layouts import on_map


@dataclass(frozen=True)
class Fit:
    """A least-squares solution and the moments of X and Y.

    Attributes:
        weight, bias: [out_width, in_width], [out_width].
        x_mean, x_variance, y_mean, y_variance: of each channel; needed for an adapter with norms.
    """

    weight: Tensor
    bias: Tensor
    x_mean: Tensor | None = None
    x_variance: Tensor | None = None
    y_mean: Tensor | None = None
    y_variance: Tensor | None = None

    def moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and variance of X, then of Y."""
        found = [m for m in (self.x_mean, self.x_variance, self.y_mean, self.y_variance) if m is not None]
        assert len(found) == 4, "fitted without the moments of X and Y"
        return found[0], found[1], found[2], found[3]


class StitchingLayer(nn.Module):
    """The map from a block output of the source anchor to a block input of the target anchor.

    Every kind has a linear core, `proj`, which is set to the least-squares solution and frozen; PST adds a low-rank update to it
    (ESTA section 4.1). The other parts, a ReLU, the eight neighbours of a 3x3 convolution or the branch of a bottleneck, are
    zero-initialised, so that every kind starts from the same fit. The bottleneck has no ReLU at its end, as the inputs of a
    transformer block are signed.

    Args:
        in_width, out_width, adapter, rescale, norm, in_grid, out_grid, special_tokens, step, inner_width: see
            `StitchingLayerSpec`.

    Shapes: [..., in_width] -> [..., out_width]; with rescaling or a 3x3 convolution [batch, special tokens + positions, in_width]
        -> [batch, special tokens + positions of `tail_grid`, out_width].

    Source: SN-Net section 3.2; Traft and Cheney section 2.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        adapter: str = "linear",
        rescale: str = "none",
        norm: str = "none",
        in_grid: tuple[int, int] | None = None,
        out_grid: tuple[int, int] | None = None,
        special_tokens: int = 0,
        step: int = 1,
        inner_width: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.adapter, self.rescale, self.special_tokens, self.step = adapter, rescale, special_tokens, step
        self.in_grid, self.out_grid = in_grid, out_grid
        self.out_dtype = dtype or torch.get_default_dtype()  # of the target anchor, also if the core trains in float32
        how: dict[str, Any] = {"dtype": dtype, "device": device}
        branch: dict[str, Any] = {
            "dtype": torch.float32,
            "device": device,
        }  # trains in float32, whatever the dtype of the anchors
        if adapter == "conv3x3_relu":
            self.proj: nn.Linear | nn.Conv2d = nn.Conv2d(in_width, out_width, 3, stride=step, padding=1, **how)
        else:
            self.proj = nn.Linear(in_width, out_width, **how)
        if adapter == "bottleneck":
            self.reduce = nn.Linear(in_width, inner_width, **branch)
            self.neighbours = nn.Conv2d(inner_width, inner_width, 3, stride=step, padding=1, **branch)
            self.expand = nn.Linear(inner_width, out_width, **branch)
        self.before = nn.BatchNorm1d(in_width, **branch) if norm == "batch" else None
        self.after = nn.BatchNorm1d(out_width, **branch) if norm == "batch" else None
        self.is_initialised = False  # True for the identity or a least-squares solution
        if self.core.weight.device.type != "meta":
            self.init_kaiming() if adapter == "linear" and not self.may_be_identity else self.init_identity()

    @property
    def core(self) -> nn.Linear | nn.Conv2d:
        """The frozen linear map, without the low-rank update that may wrap it."""
        core: nn.Linear | nn.Conv2d = getattr(self.proj, "base_layer", self.proj)
        return core

    @property
    def _core_bias(self) -> Tensor:
        assert self.core.bias is not None
        return self.core.bias

    @property
    def may_be_identity(self) -> bool:
        """Whether the layer is linear between equal widths, and so initialised as the identity."""
        return (
            self.adapter == "linear" and self.core.weight.shape[0] == self.core.weight.shape[1] and self.before is None
        )

    @property
    def tail_grid(self) -> tuple[int, int] | None:
        """The grid of the output."""
        return self.in_grid if self.rescale == "none" else self.out_grid

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Same as `nn.Module._apply`; the output dtype changes with `to(dtype)`."""
        self.out_dtype = fn(torch.empty(0, dtype=self.out_dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    # ---- initialisation

    @torch.no_grad()
    def init_kaiming(self, generator: torch.Generator | None = None) -> None:
        """Kaiming normal weight and zero bias: the baseline of the least-squares initialisation."""
        weight = self.core.weight
        if weight.device.type != "meta":
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
            weight.copy_(noise * weight[0].numel() ** -0.5)
            self._core_bias.zero_()
            self.is_initialised = False

    @torch.no_grad()
    def init_identity(self) -> None:
        """Ones on the diagonal, zero elsewhere: the leading features that both widths share are unchanged."""
        width = self.core.weight.shape[:2]
        self.set_core(torch.eye(*width), torch.zeros(width[0]))
        self.is_initialised = self.may_be_identity
        if self.adapter == "bottleneck":
            self.expand.weight.zero_()
            self.expand.bias.zero_()

    @torch.no_grad()
    def init_solution(self, fit: Fit) -> None:
        """Sets a least-squares solution: without a ReLU the output in evaluation equals its prediction, norms included."""
        self.init_identity()
        weight, bias = fit.weight, fit.bias
        if self.before is not None and self.after is not None:
            x_mean, x_variance, y_mean, y_variance = fit.moments()
            for norm, mean, variance in ((self.before, x_mean, x_variance), (self.after, y_mean, y_variance)):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(variance)
                norm.weight.fill_(1.0)
                norm.bias.zero_()
            deviation = (x_variance + self.before.eps).sqrt()  # the norm before the core divides by it
            weight, bias = weight * deviation, bias + weight @ x_mean
            self.after.weight.copy_((y_variance + self.after.eps).sqrt())
            self.after.bias.copy_(y_mean)
        self.set_core(weight, bias)
        self.is_initialised = True

    @torch.no_grad()
    def set_core(self, weight: Tensor, bias: Tensor) -> None:
        """Sets weight [out_width, in_width] and bias [out_width] of the linear core."""
        target = self.core.weight
        if target.ndim == 4:
            target.zero_()
            target[:, :, 1, 1] = weight.to(target)
        else:
            target.copy_(weight)
        self._core_bias.copy_(bias)

    # ---- the map

    def sampled(self, rows: Tensor) -> Tensor:
        """Token features as inputs of the core, one for each position of `out_grid`: the X of least squares.

        For a layer that does not change the grid they are interpolated here, for the fit only.
        """
        if self.in_grid == self.out_grid:
            return rows
        return self._strided(rows) if self.rescale == "strided" else self._interpolated(rows)

    def as_trained(self, mapped: Tensor) -> Tensor:
        """The output at `out_grid`, the grid the target block was trained for."""
        return mapped if self.tail_grid == self.out_grid else self._interpolated(mapped)

    def _interpolated(self, rows: Tensor) -> Tensor:
        def change(image: Tensor) -> Tensor:
            return F.interpolate(image, self.out_grid, mode="bilinear")

        return on_map(rows, self.in_grid, self.special_tokens, change, change_token=lambda token: token)

    def _strided(self, rows: Tensor) -> Tensor:
        return on_map(rows, self.in_grid, self.special_tokens, lambda image: image[:, :, :: self.step, :: self.step])

    def forward(self, rows: Tensor) -> Tensor:
        weight = self.core.weight
        rows = _normed(self.before, rows.to(weight.device)).to(weight.dtype)
        grid = self.in_grid
        if self.rescale == "bilinear" and grid != self.out_grid:
            rows, grid = self._interpolated(rows), self.out_grid
        if self.adapter == "conv3x3_relu":
            mapped = on_map(rows, grid, self.special_tokens, self.proj)
        else:
            mapped = self.proj(self._strided(rows) if self.step > 1 else rows)
        if self.adapter == "bottleneck":
            inner = self.reduce(rows.to(self.reduce.weight.dtype)).relu()
            inner = on_map(inner, grid, self.special_tokens, self.neighbours).relu()
            mapped = mapped + self.expand(inner).to(mapped.dtype)
        elif self.adapter != "linear":
            mapped = mapped.relu()
        return _normed(self.after, mapped).to(self.out_dtype)


def _normed(norm: nn.BatchNorm1d | None, rows: Tensor) -> Tensor:
    """Token features [batch, positions, width], each channel normalised over batch and positions."""
    if norm is None:
        return rows
    normed: Tensor = norm(rows.transpose(1, 2).to(norm.weight.dtype))
    return normed.transpose(1, 2).to(rows.dtype)
