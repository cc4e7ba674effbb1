"""`transformers.Trainer` that trains one stitch a step and distils it from the largest anchor."""

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from stitched_llama.sampling import Importance, StepSignals, StitchSampler
from stitched_llama.space import Stitch, intervals

from .arguments import StitchTrainingArguments
from .checkpoints import CheckpointMixin
from .checks import check_arguments, check_batch, check_run, check_sets
from .data import IGNORED
from .distillation import cast_inputs, distillation_loss, frozen_eval, teacher_targets
from .finite import check_step, check_weights, describe_rows, note_fault
from .interruption import Interruption
from .param_groups import scale_anchor_learning_rate, split_phases
from .phases import phase_scheduler
from .reports import ReportMixin

Gradients = dict[nn.Parameter, Tensor]


class StitchTrainer(CheckpointMixin, ReportMixin, Trainer):
    """One-stage fine-tuning of every stitch (ESTA section 4.2).

    An optimiser step draws one stitch, the student; it is the same on all ranks and in all accumulated batches of the step.
    By default two steps of three draw an anchor (`anchor_share`), which trains on labels alone and updates no importance.
    Other students are distilled from the logits of the largest anchor on the same batch as well; that forward pass runs first,
    without gradients. With `train_teacher` the largest anchor trains at every step too and is the teacher of every drawn stitch
    (ESTA). With `inplace_teacher` off there is no distillation, or the external `teacher` gives the targets (SN-Net, algorithm 1).
    Gradients of teacher and student are stored separately until the step is complete and then added, so the student's
    importance is computed from its own gradients, whatever the split into batches and ranks. One graph is alive at a time.

    Gradients are summed over ranks explicitly, once a step: each step trains other tensors, which the reducer of
    DistributedDataParallel does not support together with activation checkpointing.

    Args:
        teacher: an external teacher, a plain model of Transformers, used instead of the largest anchor; it is frozen. With
            `inplace_teacher` off anchors are distilled from it as well.
        data_settings: options that decide which rows train and which are held out, by name; stored in every checkpoint with the
            other `settings` of the run. A checkpoint with other settings is not resumed.
        args, kwargs: passed to `transformers.Trainer`.

    Raises:
        ValueError: an unsupported way of training, or a teacher with other classes.
    """

    args: StitchTrainingArguments

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | None = None,
        data_settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.data_settings = data_settings
        check_run(self, teacher)
        model = self.model
        self.stitches = [model.space[key] for key in model.keys]
        self.largest = model.space.anchor_stitch(-1)
        self.importance = Importance(self.args.importance, self.args.eta)
        old, updated = model.table, [stitch.key for stitch in model.space if self._updates_importance(stitch)]
        self.importance_score = self.args.importance_score(teacher is not None)
        if old.importance_score in (None, self.importance_score):  # averages of different scores are not mixed
            self.importance.averages.update({key: old.importance[key] for key in updated if key in old.importance})
            self.importance.visits.update({key: old.visits[key] for key in updated if key in old.visits})
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval().to(self.args.device)
        self.interruption = Interruption()
        self.add_callback(self.interruption)
        self._sampler: StitchSampler | None = None
        self._gradients: dict[str, Gradients]  # of the running step, by role: "teacher", "student"
        self.step_losses: list[float]
        self._reset_step()
        self._trainable = list[nn.Parameter]()
        self._phase: str | None = None
        self._macs = 0  # of all passes of a step, for one token or image
        self._logged: dict[str, list[float]] = defaultdict(list)
        groups = intervals([stitch.params for stitch in self.stitches], self.args.interval_count)
        self._group = {self.stitches[i].key: number for number, group in enumerate(groups) for i in group}
        self._middle_keys = {self.stitches[group[len(group) // 2]].key for group in groups}  # one an interval

    # ---- sampling

    def draw(self, step: int) -> Stitch:
        """The student of optimiser step `step`, counted from 0."""
        first = self.anchor_steps
        if step < first:
            anchors = [stitch for stitch in self.stitches if stitch.is_anchor]
            return anchors[step % len(anchors)]
        if self._sampler is None:
            two_phases = self.model.stitch_lora is not None
            self._sampler = StitchSampler(
                [stitch for stitch in self.stitches if not (two_phases and stitch.is_anchor)],
                scheme=self.args.sampling,
                interval_count=self.args.interval_count,
                warmup_steps=round(self.args.sampling_warmup * (self.state.max_steps - first)),
                floor=self.args.floor,
                anchor_share=0.0 if two_phases else self.args.share_of_anchors,
                seed=self.args.seed,
                always=[s.key for s in self.stitches if s.is_anchor and not self._needs_anchor_steps(s)],
            )
        return self.model.space[self._sampler.draw(step - first, self.importance.averages)]

    @property
    def anchor_steps(self) -> int:
        """Length of the first phase, which trains the anchors in turn; 0 unless the stitches have a separate LoRA."""
        return round(self.args.anchors_first * self.state.max_steps) if self.model.stitch_lora is not None else 0

    def _enter_phase(self, step: int) -> None:
        """Freezes the stitches' parameters in the first phase and the anchors' in the second."""
        if self.model.stitch_lora is None:
            return
        phase = "anchors" if step < self.anchor_steps else "stitches"
        if phase != self._phase:
            self.model.train_only(phase)
            self._phase, self._trainable = phase, []

    def _needs_anchor_steps(self, anchor: Stitch) -> bool:
        """False for an anchor without trainable parameters, and for the largest one where it trains at every step as the teacher."""
        parts = [self.model.anchors[segment.anchor] for segment in anchor.segments]
        bias = getattr(self.model.stitch_bias, "vectors", {})
        trains = any(p.requires_grad for part in parts for p in part.parameters()) or anchor.key in bias
        return trains and not (self.args.train_teacher and anchor.key == self.largest.key)

    # ---- one step

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Same as `Trainer.train`. On SIGTERM the running step is finished, a checkpoint saved and the process left with status 143.
        Resuming a finished run trains nothing.

        Raises:
            ValueError: a data set or batch that cannot be trained on; a loss, gradient or weight that is not finite (names stitch,
                step and rows; earlier checkpoints are kept); a checkpoint that is incomplete, or of a run with other settings.
        """
        check_sets(self)
        checkpoint = self._checkpoint_of(resume_from_checkpoint)
        if (finished := self._finished(checkpoint)) is not None:
            return finished
        self.model.train()  # even if it was in training mode before PST was attached: it decides which norms train
        self._trainable = []
        with self.interruption.awaited():
            done = super().train(checkpoint, *args, **kwargs)
        if self._phase is not None:
            self.model.train_only(None)
            self._phase = None
        check_weights(self.model, self.state.global_step)
        self.interruption.leave(self.args, self.state.global_step)
        return done

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Same as Transformers, which restarts with smaller batches after a batch did not fit into memory: the interrupted step is
        discarded, and the warm-up of the sampler is computed from the new number of steps.
        """
        self._reset_step()
        self._sampler = None
        return super()._inner_training_loop(*args, **kwargs)

    def describe_batch(self, number: int, positions: Sequence[int] | None = None) -> str:
        """Names the rows in batch `number` of the running step, or those at `positions` of it."""
        return describe_rows(self.callback_handler.train_dataloader, self.args, self.state, number, positions)

    def _reset_step(self) -> None:
        self._gradients = {"teacher": {}, "student": {}}
        self.step_losses = [0.0, 0.0]  # the student's and the teacher's, on labels
        self.batches_of_step = 0  # so far
        self.faults = list[str]()  # messages about losses of this rank that are not finite

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Teacher targets, then the student's forward and backward, on one batch; returns the student's loss for logging."""
        if not model.training:
            model.train()
        inputs = self._prepare_inputs(inputs)
        check_batch(inputs, self.model.main_input_name == "pixel_values")
        labels = inputs.pop("labels").long()
        if num_items_in_batch is None:
            num_items_in_batch = self._label_count(labels) * self.current_gradient_accumulation_steps
        if not num_items_in_batch:
            raise ValueError(
                f"step {self.state.global_step + 1} has no label to learn, all are {IGNORED} (masked): leave such rows out; the last "
                f"of them are {self.describe_batch(self.batches_of_step)}"
            )
        self._enter_phase(self.state.global_step)
        student, targets = self.draw(self.state.global_step), None
        self._macs = 3 * student.macs * self._needs_student_pass(student)
        with self._no_sync(model):
            if self._uses_inplace_teacher(student):
                self._macs += (3 if self.args.train_teacher else 1) * self.largest.macs
                with contextlib.nullcontext() if self.args.train_teacher else frozen_eval(self.model.anchors[-1]):
                    logits, wanted = self._response_logits(model, inputs, labels, self.largest)
                    loss = F.cross_entropy(logits, wanted, reduction="sum") / num_items_in_batch
                self._backward("teacher", loss)
                label_loss = student_loss = loss.detach()
                self.step_losses[1] += float(label_loss)
                targets = teacher_targets(self.args.distillation, logits)
                del logits, loss
            if self.teacher is not None and self._updates_importance(student):
                with torch.no_grad():
                    teacher_inputs = cast_inputs(self.teacher, inputs)
                    logits, wanted = self._response_logits(self.teacher, teacher_inputs, labels)
                if not self.args.inplace_teacher:  # the reference of the score excess_loss
                    loss = F.cross_entropy(logits, wanted, reduction="sum") / num_items_in_batch
                    self.step_losses[1] += float(loss)
                targets = teacher_targets(self.args.distillation, logits)
                del logits
            batch = (inputs, labels, targets, num_items_in_batch)
            if self._needs_student_pass(student):
                label_loss, student_loss = self._train_student(model, student, *batch)
        self.step_losses[0] += float(label_loss)
        note_fault(self, student, float(student_loss), inputs, labels)
        self.batches_of_step += 1
        if self.accelerator.sync_gradients:
            self._complete_step(student)
        return student_loss * self.accelerator.num_processes  # the log averages over ranks

    def _train_student(
        self, model: nn.Module, stitch: Stitch, inputs: dict, labels: Tensor, targets: Tensor | None, items: Any
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward of the student; returns its loss on labels and its whole loss, both detached."""
        logits, wanted = self._response_logits(model, inputs, labels, stitch)
        label_loss = F.cross_entropy(logits, wanted, reduction="sum") / items
        kind, weight = self.args.distillation, self.args.distillation_weight
        loss = distillation_loss(kind, weight, logits, targets, label_loss, items)
        self._backward("student", loss)
        return label_loss.detach(), loss.detach()

    def _uses_inplace_teacher(self, student: Stitch) -> bool:
        """Whether the student is distilled from the largest anchor; a drawn anchor only with `train_teacher` (ESTA)."""
        return self.args.inplace_teacher and (self.args.train_teacher or not student.is_anchor)

    def _updates_importance(self, student: Stitch) -> bool:
        """Whether a step of the student updates its importance, and an external teacher gives it targets: all but anchors that train
        on labels alone."""
        return self._uses_inplace_teacher(student) or not self.args.inplace_teacher

    def _needs_student_pass(self, student: Stitch) -> bool:
        """False where the largest anchor is drawn and was trained as the teacher of this step already."""
        return not (self.args.train_teacher and student.key == self.largest.key)

    def _label_count(self, labels: Tensor) -> Tensor:
        return (labels[:, 1:] != IGNORED).sum()

    def _response_logits(
        self, model: nn.Module, inputs: dict, labels: Tensor, stitch: Stitch | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [labels, vocabulary] at the labelled positions, and those labels [labels]; `stitch` is None for a plain model."""
        route = {} if stitch is None else {"stitch_id": stitch.key}
        logits = model(**inputs, **route, use_cache=False).logits[:, :-1]
        wanted = labels[:, 1:].to(logits.device)
        return logits[wanted != IGNORED].float(), wanted[wanted != IGNORED]

    def _no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()

    def _backward(self, role: str, loss: Tensor) -> None:
        """Adds the gradients of `loss` to those stored for `role`; nothing if no parameter on the route trains."""
        if not loss.requires_grad:
            return
        gradients = self._gradients[role]
        self._trainable = self._trainable or [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self._trainable:
            parameter.grad = gradients.get(parameter)
        self.accelerator.backward(loss)
        for parameter in self._trainable:
            if parameter.grad is not None:
                gradients[parameter] = parameter.grad
            parameter.grad = None

    def _complete_step(self, student: Stitch) -> None:
        """Sums the gradients of both roles over ranks, updates the student's importance, and passes their sum to the optimiser."""
        scalars = [*self.step_losses, float(self.interruption.received)]
        losses = torch.tensor(scalars, device=self.args.device, dtype=torch.float64)
        gradients = [g for of_role in self._gradients.values() for g in of_role.values()]
        self._sum_over_ranks([*gradients, losses])
        statistics = [tensor for tensor in self.model.stitching_layers.buffers() if tensor.is_floating_point()]
        self._sum_over_ranks(statistics, share=1 / self.accelerator.num_processes)
        *step_losses, interrupted = losses.tolist()
        check_step(self, student, step_losses, gradients)
        self.interruption.agreed = interrupted > 0
        own = self._gradients["student" if self._needs_student_pass(student) else "teacher"]
        signals = self._step_signals(own, *step_losses)
        if self._updates_importance(student):
            self.importance.update(student.key, signals)
        if self._uses_inplace_teacher(student):
            self._logged["loss_teacher"].append(signals.teacher_loss)
        self._logged[f"loss_interval_{self._group[student.key]}"].append(signals.loss)
        for of_role in self._gradients.values():
            for parameter, gradient in of_role.items():
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._reset_step()

    def _step_signals(self, gradients: Gradients, *losses: float) -> StepSignals:
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler is not None else 1.0
        device = self.args.device
        saliency = sum(
            ((g * p.detach()).abs().sum().to(device) for p, g in gradients.items()), torch.zeros((), device=device)
        )
        squares = sum((g.square().sum().to(device) for g in gradients.values()), torch.zeros((), device=device))
        return StepSignals(float(saliency) / scale, float(squares) ** 0.5 / scale, *losses)

    def _sum_over_ranks(self, tensors: list[Tensor], share: float = 1.0) -> None:
        """Sums in place, scaled by `share`. All ranks drew the same stitch, so the order of the tensors is the same."""
        if self.accelerator.num_processes > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor.mul_(share))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Same as `Trainer.create_optimizer`; trainable pretrained weights get `anchor_lr_scale` times the rate (SN-Net 4: 0.1)."""
        made, optimizer = self.optimizer is None, super().create_optimizer(model)
        if made and self.model.stitch_lora is not None:
            split_phases(self.model, optimizer)
        if made and self.args.anchor_lr_scale != 1:
            scale_anchor_learning_rate(self.model, optimizer, self.args.anchor_lr_scale)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Same as `Trainer.create_scheduler`; with two phases each has its own warm-up and decay."""
        made = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if made and self.model.stitch_lora is not None:
            first = round(self.args.anchors_first * num_training_steps)
            self.lr_scheduler = scheduler = phase_scheduler(self.args, scheduler.optimizer, first, num_training_steps)
        return scheduler

    def _get_learning_rate(self) -> float:
        """The learning rate to log: that of the running phase."""
        if self.model.stitch_lora is None:
            return super()._get_learning_rate()
        return max(group["lr"] for group in self.optimizer.param_groups)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Same as `Trainer.init_hf_repo`, after unsupported arguments were rejected."""
        check_arguments(self.args)
        super().init_hf_repo(*args, **kwargs)
