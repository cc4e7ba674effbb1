"""What a teacher says and what a student makes of it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextlib.contextmanager
def speaking(teacher: nn.Module) -> Iterator[None]:
    """The teacher without gradients and dropout; afterwards each of its modules is in the mode it was in."""
    training = [module for module in teacher.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def in_dtype_of(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, where they are numbers and not ids, in the dtype of a model."""
    dtype = next(model.parameters()).dtype
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def word_of(kind: str, logits: Tensor) -> Tensor | None:
    """What a student needs of its teacher's logits [labels, classes]: for `"hard"` their argmax [labels], which takes a vocabulary
    less; for `"soft"` themselves; for `"none"` nothing."""
    if kind == "none":
        return None
    return logits.detach().argmax(-1) if kind == "hard" else logits.detach()


def distil(kind: str, weight: float, logits: Tensor, word: Tensor | None, label_loss: Tensor, items: Any) -> Tensor:
    """A student's loss: its share of the labels and of the teacher's word (ESTA section 4.2: hard labels).

    Args:
        kind: `"hard"`, the teacher's argmax; `"soft"`, the divergence from its distribution.
        weight: the teacher's share.
        logits: [labels, classes].
        word: of the teacher, as `word_of` gives it; None where nobody teaches.
        label_loss: the student's loss on labels, a scalar.
        items: labels of the whole step.
    """
    if word is None or weight == 0:
        return label_loss
    if kind == "hard":
        taught = F.cross_entropy(logits, word, reduction="sum")
    else:
        taught = F.kl_div(logits.log_softmax(-1), word.log_softmax(-1), reduction="sum", log_target=True)
    return (1 - weight) * label_loss + weight * taught / items
