"""`transformers.Trainer` for the distillation of a cut model, and its arguments."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from .distillation import ShrinkDistillation


@dataclass
class ShrinkArguments(TrainingArguments):
    """`TrainingArguments` with defaults for distilling a cut model, and the weights of its loss.

    Raises:
        ValueError: a share outside 0..1 or a negative weight.
    """

    output_dir: str = field(default="runs/shrunk", metadata={"help": "Where checkpoints and the small model go."})
    max_steps: int = field(default=2000, metadata={"help": "Optimiser steps."})
    learning_rate: float = field(default=8e-4, metadata={"help": "Peak rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Learning rate schedule."})
    lr_scheduler_kwargs: dict | str | None = field(
        default_factory=lambda: {"min_lr_rate": 0.1}, metadata={"help": "Options of the schedule."}
    )
    warmup_steps: float = field(default=0.02, metadata={"help": "Steps, or share of all steps, of warm-up."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW."})
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Blocks of tokens (or images) in a batch on each device."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Where logs go, as in Transformers."})
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "Needed for mixed routes, which omit student blocks."}
    )
    prediction_loss_only: bool = field(default=True, metadata={"help": "Do not collect logits in an evaluation."})
    alignment_weight: float = field(default=2.0, metadata={"help": "Weight of the cosine distance of block outputs."})
    label_weight: float = field(default=0.0, metadata={"help": "Weight of cross-entropy to the labels."})
    mixed_share: float = field(default=0.5, metadata={"help": "Share of the batches that run a mixed route."})
    logit_share: float = field(default=0.5, metadata={"help": "Share of the positions whose logits are compared."})

    def __post_init__(self):
        for name in ("mixed_share", "logit_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a share lies in 0..1")
        for name in ("alignment_weight", "label_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; a weight cannot be negative")
        super().__post_init__()

    def loss_options(self) -> dict[str, float]:
        """The options of `ShrinkDistillation` that these arguments hold."""
        return {
            name: getattr(self, name) for name in ("alignment_weight", "label_weight", "mixed_share", "logit_share")
        }


class ShrinkTrainer(Trainer):
    """Trains a `ShrinkDistillation`; also logs divergence and alignment. Checkpoints hold the trained parameters only."""

    model: ShrinkDistillation

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model._keys_to_ignore_on_save = None  # read by Trainer when it resumes
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch: Trainer divides by the accumulation
        self._logged: dict[str, list[Tensor]] = defaultdict(list)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        outputs = model(**inputs)
        for name in ("divergence", "alignment"):
            self._logged[name].append(outputs[name])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Loss, divergence and alignment of the student alone on held-out data."""
        logged, self._logged = self._logged, defaultdict(list)
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in self._means().items()}
        self._logged = logged
        return metrics

    def _means(self) -> dict[str, float]:
        return {name: float(sum(values)) / len(values) for name, values in self._logged.items() if values}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._means()
            self._logged.clear()
        super().log(logs, start_time)
