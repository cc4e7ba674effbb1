"""`transformers.Trainer` for the distillation of a cut model, and its arguments."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from stitched_llama.bundles import WEIGHTS, check_finite, fingerprint_tensors
from stitched_llama.training import FiniteGradients, check_launch, run_settings
from stitched_llama.training.checkpoints import CheckpointMixin
from stitched_llama.training.finite import check_weights
from stitched_llama.training.interruption import Interruption

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

    def __getstate__(self) -> dict[str, Any]:
        """What `training_args.bin` beside a checkpoint holds: no tokens."""
        return {name: None if name.endswith("_token") else value for name, value in vars(self).items()}

    def loss_options(self) -> dict[str, float]:
        """The options of `ShrinkDistillation` that these arguments hold."""
        return {
            name: getattr(self, name) for name in ("alignment_weight", "label_weight", "mixed_share", "logit_share")
        }


class ShrinkTrainer(CheckpointMixin, Trainer):
    """Trains a `ShrinkDistillation`; logs divergence and alignment beside the loss. Checkpoints hold what trains, what their run was
    started with, and digests.

    Args:
        data_settings: what decides which blocks train and which are held out, by the names of options; a checkpoint of others is not
            resumed.
        args, kwargs: as `transformers.Trainer` has them.

    Raises:
        ValueError: a way of training that is not supported.
    """

    model: ShrinkDistillation
    saves_bundles = False

    def __init__(self, *args: Any, data_settings: Mapping[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_launch(self.args)
        self.data_settings = data_settings
        self.interruption = Interruption()
        self.add_callback(self.interruption)
        self.add_callback(FiniteGradients())
        self.model._keys_to_ignore_on_save = None  # read by Trainer when it resumes
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch: Trainer divides by the accumulation
        self._logged: dict[str, list[Tensor]] = defaultdict(list)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """What Trainer calls for push_to_hub.

        Raises:
            ValueError: always.
        """
        raise ValueError("push_to_hub would upload checkpoints that nothing loads: leave it off, upload what comes out")

    def settings(self) -> dict[str, Any]:
        """What decides blocks and steps, as each checkpoint holds it."""
        own = {
            "training_rows": len(self.train_dataset),
            "large_digest": self._large_digest,
            "target_blocks": self.model.target_blocks,
            "width": self.model.config.hidden_size,
            "trained_parts": hashlib.sha256(json.dumps(sorted(self.model.state_dict())).encode()).hexdigest(),
        }
        return run_settings(self.args, self.data_settings or {}, own)

    @cached_property
    def _large_digest(self) -> str:
        parts = fingerprint_tensors({name: p.data for name, p in self.model.teacher.named_parameters()})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `StitchTrainer.train`: from a whole checkpoint of the same run or the beginning; the end of a finished run is resumed by
        training nothing; SIGTERM ends it with a checkpoint.

        Raises:
            ValueError: a gradient or weight that is not finite, a checkpoint that is not whole or of a run of other settings.
        """
        checkpoint = self._checkpoint_of(resume_from_checkpoint)
        if (finished := self._finished(checkpoint)) is not None:
            return finished
        with self.interruption.awaited():
            done = super().train(checkpoint, *args, **kwargs)
        check_weights(self.model, self.state.global_step)
        self.interruption.leave(self.args, self.state.global_step)
        return done

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            came = torch.tensor(float(self.interruption.received), device=self.args.device)
            self.interruption.agreed = float(self.accelerator.reduce(came)) > 0
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Same as `Trainer.save_model`.

        Raises:
            ValueError: a weight is not finite.
        """
        check_weights(self.model, self.state.global_step)
        Trainer.save_model(self, output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """What trains comes back whole or not at all."""
        path = Path(resume_from_checkpoint) / WEIGHTS
        found, own = load_file(path), self.model.state_dict()
        if differ := sorted(
            n for n in found.keys() | own if n not in found or n not in own or found[n].shape != own[n].shape
        ):
            raise ValueError(f"{path} and this model differ in {differ[0]}: resume with the options it began with")
        check_finite(found, str(path))
        for name, tensor in own.items():
            tensor.copy_(found[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        outputs = model(**inputs)
        for name in ("divergence", "alignment"):
            self._logged[name].append(outputs[name])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Loss, divergence and alignment of the student alone on held-out data.

        Raises:
            ValueError: one is not finite.
        """
        logged, self._logged = self._logged, defaultdict(list)
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in self._means().items()}
        self._logged = logged
        for name in ("loss", "divergence", "alignment"):
            if not math.isfinite(value := metrics.get(f"{metric_key_prefix}_{name}", 0.0)):
                raise ValueError(
                    f"{name} on held-out data is {value} after step {self.state.global_step}: weights of the large or the small model are "
                    "damaged, or the dtype is too narrow"
                )
        return metrics

    def _means(self) -> dict[str, float]:
        return {name: float(sum(values)) / len(values) for name, values in self._logged.items() if values}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._means()
            self._logged.clear()
        super().log(logs, start_time)
