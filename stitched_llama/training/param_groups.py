"""Parameter groups: learning rates and phases that differ within one optimiser."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stitched_llama.pst import is_low_rank


def split_groups(
    optimizer: torch.optim.Optimizer, chosen: set[nn.Parameter], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Moves the chosen parameters of every group to a further group, which differs from it by `change(group)`."""
    for group in list(optimizer.param_groups):
        parameters = group["params"]
        group["params"] = [p for p in parameters if p not in chosen]
        optimizer.add_param_group({**group, **change(group), "params": [p for p in parameters if p in chosen]})


def scale_anchor_learning_rate(model: Any, optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Splits every parameter group: the anchors' pretrained weights get `scale` times its learning rate, new heads do not."""
    heads = tuple(model.trained_heads(range(len(model.anchors))))
    named = [(n, p) for n, p in model.named_parameters() if n.startswith("anchors.") and not is_low_rank(n)]
    pretrained = {p for n, p in named if not n.startswith(heads)}
    split_groups(optimizer, pretrained, lambda group: {"lr": group["lr"] * scale})


def split_phases(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Splits every parameter group into the anchors' and the stitches' parameters, marked by `group["phase"]`."""
    stitches = {p for name, p in model.named_parameters() if not name.startswith("anchors.")}
    for group in optimizer.param_groups:
        group["phase"] = "anchors"
    split_groups(optimizer, stitches, lambda group: {"phase": "stitches"})
