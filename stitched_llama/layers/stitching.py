"""The learned map at a junction."""

import torch
from torch import nn


class StitchingLayer(nn.Module):
    """A linear map with bias from the residual stream of one anchor to that of the next.

    `proj` is frozen once it is initialised; PST adds a low-rank update to it (ESTA section 4.1).

    Shapes: [..., in_width] -> [..., out_width].
    """

    def __init__(
        self, in_width: int, out_width: int, dtype: torch.dtype | None = None, device: torch.device | None = None
    ):
        super().__init__()
        self.proj = nn.Linear(in_width, out_width, dtype=dtype, device=device)
        self.init_kaiming()

    @torch.no_grad()
    def init_kaiming(self, generator: torch.Generator | None = None) -> None:
        """Kaiming normal weight, zero bias: what the least-squares start is compared with."""
        weight = self.linear.weight
        if weight.device.type != "meta":
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
            weight.copy_(noise * weight.shape[1] ** -0.5)
            self.linear.bias.zero_()

    @torch.no_grad()
    def init_identity(self) -> None:
        """Ones on the diagonal, zero elsewhere: the shared leading features pass unchanged."""
        weight = self.linear.weight
        weight.copy_(torch.eye(*weight.shape, dtype=weight.dtype, device=weight.device))
        self.linear.bias.zero_()

    @torch.no_grad()
    def init_solution(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Takes a least-squares solution: weight [out_width, in_width], bias [out_width]."""
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(bias)

    @property
    def linear(self) -> nn.Linear:
        """The frozen map itself, also where a low-rank update is wrapped around it."""
        return getattr(self.proj, "base_layer", self.proj)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = self.linear.weight
        return self.proj(hidden.to(device=weight.device, dtype=weight.dtype))
