"""Learning rates that differ within one optimiser."""

from typing import Any

import torch

from stitched_llama.pst import is_low_rank


def slow_down_anchors(model: Any, optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Splits every group of the optimiser: the anchors' pretrained weights take `scale` times the rate, new heads do not."""
    heads = tuple(model.trained_heads(range(len(model.anchors))))
    named = [(n, p) for n, p in model.named_parameters() if n.startswith("anchors.") and not is_low_rank(n)]
    slow = {p for n, p in named if not n.startswith(heads)}
    for group in list(optimizer.param_groups):
        parameters = group["params"]
        group["params"] = [p for p in parameters if p not in slow]
        rate = group["lr"] * scale
        optimizer.add_param_group({**group, "params": [p for p in parameters if p in slow], "lr": rate})
