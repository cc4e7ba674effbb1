"""Ends a run at the first loss, gradient or weight that is not finite; the error names stitch, step and rows."""

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from stitched_llama.space import Stitch

_SHOWN = 16  # rows listed in a message
_ADVICE = (
    "Nothing of this step is saved, earlier checkpoints are unchanged: correct or remove those rows, or start again with a lower "
    "learning_rate"
)


def rows_of_batch(loader: Any, args: Any, state: Any, number: int) -> list[int] | None:
    """Indices in the training set of batch `number` of the running step, on this rank; None if the order is unknown."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    inner = getattr(batch_sampler, "batch_sampler", batch_sampler)
    if not isinstance(getattr(inner, "sampler", None), (SeedableRandomSampler, SequentialSampler)):
        return None
    batches = args.gradient_accumulation_steps
    epoch, step = divmod(state.global_step, math.ceil(len(loader) / batches))
    if isinstance(inner.sampler, SeedableRandomSampler):
        inner.sampler.set_epoch(epoch)
    return next(islice(iter(batch_sampler), step * batches + number, None), None)


@torch.no_grad()
def rows_without_loss(trainer: Any, key: str, inputs: dict[str, Tensor], labels: Tensor) -> list[int]:
    """Positions in the batch of the rows whose loss, computed row by row, is not finite."""
    stitch = trainer.model.space[key]

    def loss(row: slice) -> Tensor:
        part = {name: tensor[row] for name, tensor in inputs.items()}
        logits, wanted = trainer._response_logits(trainer.model, part, labels[row], stitch)
        return nn.functional.cross_entropy(logits, wanted, reduction="sum")

    return [i for i in range(len(labels)) if not loss(slice(i, i + 1)).isfinite()]


def describe_rows(loader: Any, args: Any, state: Any, number: int, positions: Sequence[int] | None = None) -> str:
    """Names the rows in a batch of the running step, or those at `positions` of it."""
    rows = rows_of_batch(loader, args, state, number)
    where = f"batch {number} of the step on rank {args.process_index}"
    if rows is None:
        return f"{where}" + (f", its rows {_some(positions)}" if positions else "")
    return f"rows {_some(rows if not positions else [rows[i] for i in positions])} of the training set ({where})"


def _some(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:_SHOWN])) + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")


def note_fault(trainer: Any, student: Stitch, loss: float, inputs: dict[str, Tensor], labels: Tensor) -> None:
    """Records the first loss of the running step that is not finite, the student's or the teacher's, and its rows."""
    if trainer.faults or (math.isfinite(loss) and math.isfinite(trainer.step_losses[1])):
        return
    stitch, faulty = student, list[int]()
    if math.isfinite(loss):
        stitch, loss = trainer.largest, trainer.step_losses[1]
    if stitch is student or trainer.args.inplace_teacher:
        name, faulty = (
            f"stitch {stitch.stitch_id} ({stitch.key})",
            rows_without_loss(trainer, stitch.key, inputs, labels),
        )
    else:
        name = "the teacher"
    rows = trainer.describe_batch(trainer.batches_of_step, faulty if len(faulty) < len(labels) else None)
    trainer.faults.append(f"the loss of {name} is {loss} on {rows}")


def check_step(trainer: Any, student: Stitch, losses: Sequence[float], gradients: Sequence[Tensor]) -> None:
    """Rejects a step whose losses or gradients are not finite, on all ranks alike. Gradients that overflow under float16 are left to
    the gradient scaler, which skips the step.

    Args:
        losses, gradients: summed over ranks.

    Raises:
        ValueError: names stitch, step and rows.
    """
    scaler = trainer.accelerator.scaler
    skips = scaler is not None and scaler.get_scale() >= 1
    if all(map(math.isfinite, losses)) and (skips or _are_finite(gradients)):
        return
    faults: list[Any] = [trainer.faults]
    if trainer.accelerator.num_processes > 1:
        faults = [None] * trainer.accelerator.num_processes
        torch.distributed.all_gather_object(faults, trainer.faults)
    messages = [fault for of_rank in faults for fault in of_rank]
    if not messages:
        rows = "; ".join(map(trainer.describe_batch, range(trainer.batches_of_step)))
        messages = [f"the gradient of stitch {student.stitch_id} ({student.key}) is not finite on {rows}"]
    raise ValueError(f"step {trainer.state.global_step + 1}: {'; '.join(messages)}. {_ADVICE}")


def _are_finite(gradients: Sequence[Tensor]) -> bool:
    return not gradients or bool(torch.nn.utils.get_total_norm(gradients).isfinite())


class FiniteGradients(TrainerCallback):
    """The same check for a plain `Trainer`, which would continue and hide the loss from its log."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if args.fp16 or _are_finite(gradients):  # under float16 the gradient scaler skips an overflow
            return
        batches = range(args.gradient_accumulation_steps)
        rows = "; ".join(describe_rows(train_dataloader, args, state, number) for number in batches)
        raise ValueError(f"step {state.global_step + 1}: the gradient is not finite on {rows}. {_ADVICE}")


def check_weights(model: nn.Module, step: int) -> None:
    """Rejects weights that are not finite, before they are saved.

    Raises:
        ValueError: names the tensor.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise ValueError(
                f"{name} is not finite after step {step}: nothing is saved of it; the last checkpoint is unchanged, start again with a "
                "lower learning_rate"
            )
