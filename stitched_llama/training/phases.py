"""Training in two phases, for stitches with a separate LoRA: first the anchors, then the stitches on frozen anchors."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler


def phase_scheduler(args: Any, optimizer: torch.optim.Optimizer, first: int, steps: int) -> LambdaLR:
    """The configured schedule twice, each with its own warm-up: over `first` steps for the anchors, over the rest for the stitches.

    Raises:
        ValueError: a schedule that is not a function of the step.
    """

    def factor(count: int) -> Callable[[int], float]:
        probe = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        made = get_scheduler(
            args.lr_scheduler_type,
            probe,
            num_warmup_steps=args.get_warmup_steps(count),
            num_training_steps=count,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        if not isinstance(made, LambdaLR):
            raise ValueError(
                f"lr_scheduler_type {args.lr_scheduler_type} is not a function of the step, which training in two phases needs: use "
                "cosine, linear or constant"
            )
        return made.lr_lambdas[0]

    own = {"anchors": factor(max(1, first)), "stitches": factor(max(1, steps - first))}
    scales = {
        "anchors": lambda step: own["anchors"](step) if step < first else 0.0,
        "stitches": lambda step: own["stitches"](step - first) if step >= first else 0.0,
    }
    return LambdaLR(optimizer, [scales[group["phase"]] for group in optimizer.param_groups])
