"""Parameter groups: learning rates that differ within one optimiser."""

from typing import Any

import torch

from stitched_llama.pst import is_low_rank


def scale_anchor_learning_rate(model: Any, optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Splits every parameter group: the anchors' pretrained weights get `scale` times its learning rate, new heads do not."""
    heads = tuple(model.trained_heads(range(len(model.anchors))))
    named = [(n, p) for n, p in model.named_parameters() if n.startswith("anchors.") and not is_low_rank(n)]
    pretrained = {p for n, p in named if not n.startswith(heads)}
    for group in list(optimizer.param_groups):
        parameters = group["params"]
        group["params"] = [p for p in parameters if p not in pretrained]
        rate = group["lr"] * scale
        optimizer.add_param_group({**group, "params": [p for p in parameters if p in pretrained], "lr": rate})
