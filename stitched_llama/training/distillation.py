"""Distillation: targets from a teacher's logits and the student's loss on them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextlib.contextmanager
def frozen_eval(teacher: nn.Module) -> Iterator[None]:
    """Runs a teacher without gradients and dropout; on exit each of its modules is in its previous mode."""
    training = [module for module in teacher.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def cast_inputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with floating-point tensors in the dtype of `model`; ids and masks are unchanged."""
    dtype = next(model.parameters()).dtype
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def teacher_targets(kind: str, teacher_logits: Tensor) -> Tensor | None:
    """Distillation targets from a teacher's logits [labels, classes].

    `"hard"`: their argmax [labels], which is smaller by a factor of the vocabulary; `"soft"`: the logits; `"none"`: None.
    """
    if kind == "none":
        return None
    return teacher_logits.detach().argmax(-1) if kind == "hard" else teacher_logits.detach()


def distillation_loss(
    kind: str, weight: float, student_logits: Tensor, targets: Tensor | None, label_loss: Tensor, items: Any
) -> Tensor:
    """A student's loss: `(1 - weight) * label_loss + weight *` its loss on the teacher's targets (ESTA section 4.2: hard labels).

    Args:
        kind: `"hard"`, cross-entropy to the teacher's argmax; `"soft"`, Kullback-Leibler divergence from its distribution.
        weight: of the distillation loss, in 0..1.
        student_logits: [labels, classes].
        targets: from `teacher_targets`; None without distillation, then the result is `label_loss`.
        label_loss: the student's loss on labels, a scalar.
        items: number of labels in the whole optimiser step.
    """
    if targets is None or weight == 0:
        return label_loss
    if kind == "hard":
        loss = F.cross_entropy(student_logits, targets, reduction="sum")
    else:
        loss = F.kl_div(student_logits.log_softmax(-1), targets.log_softmax(-1), reduction="sum", log_target=True)
    return (1 - weight) * label_loss + weight * loss / items
