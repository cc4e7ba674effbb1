"""`transformers.Trainer` that trains one stitch a step, taught by the largest anchor."""

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
from .finite import check_step, check_weights, describe_rows, note_fault
from .interruption import Interruption
from .phases import part_phases, phase_scheduler
from .rates import slow_down_anchors
from .reports import ReportMixin
from .teaching import distil, in_dtype_of, speaking, word_of

Gradients = dict[nn.Parameter, Tensor]


class StitchTrainer(CheckpointMixin, ReportMixin, Trainer):
    """One-stage fine-tuning of every stitch (ESTA section 4.2).

    An optimiser step draws one stitch, the student, equal on all ranks and over all its accumulated batches. Two steps of
    three go to the anchors (`anchor_share`), which learn from labels alone and are not rated. Other students learn from
    the word of the largest anchor on the same batch as well; it runs before them and does not train. With `train_teacher`
    it does, and teaches whatever is drawn (ESTA). With `inplace_teacher` off nobody teaches, or `teacher` does (SN-Net,
    algorithm 1).
    Gradients of teacher and student are kept apart until the step is complete, so the student's importance is read from
    its own, whatever the split into batches and ranks; then they are added. One graph is alive at a time.

    Gradients of the trained parts are summed over ranks by hand, once a step: a route touches other tensors each time,
    which DistributedDataParallel's own reducer cannot follow together with activation checkpointing.

    Args:
        teacher: a plain model of Transformers that teaches in the largest anchor's stead; frozen. Where that one speaks no
            more (`inplace_teacher` off) it teaches anchors as well.
        data_settings: what decides which rows train and which are held out, by the names of options; with what else decides a
            run (`settings`) it lies in every checkpoint, and one of others is not resumed.
        args, kwargs: as `transformers.Trainer` has them.

    Raises:
        ValueError: a way of training that is not supported, or a teacher of other classes.
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
        old, rated = model.table, [stitch.key for stitch in model.space if self._is_rated(stitch)]
        self.rating = self.args.rating(teacher is not None)
        if old.importance_score in (None, self.rating):  # averages of different scores do not mix
            self.importance.averages.update({key: old.importance[key] for key in rated if key in old.importance})
            self.importance.visits.update({key: old.visits[key] for key in rated if key in old.visits})
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval().to(self.args.device)
        self.interruption = Interruption()
        self.add_callback(self.interruption)
        self._sampler: StitchSampler | None = None
        self._kept: dict[str, Gradients]
        self.step_losses: list[float]
        self._forget_step()
        self._trained = list[nn.Parameter]()
        self._phase: str | None = None
        self._macs = 0  # of the passes of a step, a token or image
        self._logged: dict[str, list[float]] = defaultdict(list)
        groups = intervals([stitch.params for stitch in self.stitches], self.args.interval_count)
        self._group = {self.stitches[i].key: number for number, group in enumerate(groups) for i in group}
        self._middles = {self.stitches[group[len(group) // 2]].key for group in groups}

    # ---- drawing

    def draw(self, step: int) -> Stitch:
        """The student of optimiser step `step`."""
        first = self.anchor_steps
        if step < first:
            anchors = [stitch for stitch in self.stitches if stitch.is_anchor]
            return anchors[step % len(anchors)]
        if self._sampler is None:
            parted = self.model.stitch_lora is not None
            self._sampler = StitchSampler(
                [stitch for stitch in self.stitches if not (parted and stitch.is_anchor)],
                scheme=self.args.sampling,
                interval_count=self.args.interval_count,
                warmup_steps=round(self.args.sampling_warmup * (self.state.max_steps - first)),
                floor=self.args.floor,
                anchor_share=0.0 if parted else self.args.share_of_anchors,
                seed=self.args.seed,
                always=[anchor.key for anchor in self.stitches if anchor.is_anchor and not self._gains(anchor)],
            )
        return self.model.space[self._sampler.draw(step - first, self.importance.averages)]

    @property
    def anchor_steps(self) -> int:
        """Steps at the beginning that train the anchors in turn, where the stitches have a LoRA of their own; 0 otherwise."""
        return round(self.args.anchors_first * self.state.max_steps) if self.model.stitch_lora is not None else 0

    def _enter_phase(self, step: int) -> None:
        """Freezes the stitches' parts while the anchors train, and the anchors' while the stitches do."""
        if self.model.stitch_lora is None:
            return
        phase = "anchors" if step < self.anchor_steps else "stitches"
        if phase != self._phase:
            self.model.train_only(phase)
            self._phase, self._trained = phase, []

    def _gains(self, anchor: Stitch) -> bool:
        """Whether a step of its own would teach an anchor anything: it trains anyway, or nothing of it trains."""
        parts = [self.model.anchors[segment.anchor] for segment in anchor.segments]
        bias = getattr(self.model.stitch_bias, "vectors", {})
        trains = any(p.requires_grad for part in parts for p in part.parameters()) or anchor.key in bias
        return trains and not (self.args.train_teacher and anchor.key == self.largest.key)

    # ---- one step

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Transformers has it. SIGTERM ends it with a checkpoint at the end of the running step, and the process with 143.
        The end of a finished run is resumed by training nothing.

        Raises:
            ValueError: a data set or batch that cannot be trained on; a loss, gradient or weight that is not finite (names stitch,
                step and rows; what was saved before stands); a checkpoint that is not whole, or of a run of other settings.
        """
        check_sets(self)
        checkpoint = self._checkpoint_of(resume_from_checkpoint)
        if (finished := self._finished(checkpoint)) is not None:
            return finished
        self.model.train()  # also where it was in training mode before PST came: which norms train is decided here
        self._trained = []
        with self.interruption.awaited():
            done = super().train(checkpoint, *args, **kwargs)
        if self._phase is not None:
            self.model.train_only(None)
            self._phase = None
        check_weights(self.model, self.state.global_step)
        self.interruption.leave(self.args, self.state.global_step)
        return done

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers has it, which starts anew with smaller batches after one did not fit: nothing of that step counts, and
        the warm-up of the draws is a share of the steps there are now.
        """
        self._forget_step()
        self._sampler = None
        return super()._inner_training_loop(*args, **kwargs)

    def describe_batch(self, number: int, positions: Sequence[int] | None = None) -> str:
        """Which rows batch `number` of the running step holds, or those at `positions` of it."""
        return describe_rows(self.callback_handler.train_dataloader, self.args, self.state, number, positions)

    def _forget_step(self) -> None:
        self._kept = {"teacher": {}, "student": {}}
        self.step_losses = [0.0, 0.0]  # the student's and the teacher's, on labels
        self.batches_of_step = 0  # so far
        self.faults = list[str]()  # losses of this rank that are not finite

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The teacher's word, then the student's forward and backward, on one batch; returns the student's loss for logging."""
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
        student, word = self.draw(self.state.global_step), None
        self._macs = 3 * student.macs * self._has_own_gradients(student)
        with self._unreduced(model):
            if self._is_taught(student):
                self._macs += (3 if self.args.train_teacher else 1) * self.largest.macs
                with contextlib.nullcontext() if self.args.train_teacher else speaking(self.model.anchors[-1]):
                    logits, wanted = self._response_logits(model, inputs, labels, self.largest)
                    loss = F.cross_entropy(logits, wanted, reduction="sum") / num_items_in_batch
                self._backward("teacher", loss)
                label_loss = student_loss = loss.detach()
                self.step_losses[1] += float(label_loss)
                word = word_of(self.args.distillation, logits)
                del logits, loss
            if self.teacher is not None and self._is_rated(student):
                with torch.no_grad():
                    inputs_there = in_dtype_of(self.teacher, inputs)
                    logits, wanted = self._response_logits(self.teacher, inputs_there, labels)
                if not self.args.inplace_teacher:  # what the student's loss is rated against
                    loss = F.cross_entropy(logits, wanted, reduction="sum") / num_items_in_batch
                    self.step_losses[1] += float(loss)
                word = word_of(self.args.distillation, logits)
                del logits
            batch = (inputs, labels, word, num_items_in_batch)
            if self._has_own_gradients(student):
                label_loss, student_loss = self._learn(model, student, *batch)
        self.step_losses[0] += float(label_loss)
        note_fault(self, student, float(student_loss), inputs, labels)
        self.batches_of_step += 1
        if self.accelerator.sync_gradients:
            self._complete_step(student)
        return student_loss * self.accelerator.num_processes  # the log averages over ranks

    def _learn(
        self, model: nn.Module, stitch: Stitch, inputs: dict, labels: Tensor, word: Tensor | None, items: Any
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward of the student on labels and on what it is taught; its loss on labels alone, and in all."""
        logits, wanted = self._response_logits(model, inputs, labels, stitch)
        label_loss = F.cross_entropy(logits, wanted, reduction="sum") / items
        loss = distil(self.args.distillation, self.args.distillation_weight, logits, word, label_loss, items)
        self._backward("student", loss)
        return label_loss.detach(), loss.detach()

    def _is_taught(self, student: Stitch) -> bool:
        """Whether the largest anchor teaches it: an anchor learns as it would alone, unless it is a student like others (ESTA)."""
        return self.args.inplace_teacher and (self.args.train_teacher or not student.is_anchor)

    def _is_rated(self, student: Stitch) -> bool:
        """Whether its steps tell its importance, and an outer teacher teaches it: not an anchor's, where others have a teacher."""
        return self._is_taught(student) or not self.args.inplace_teacher

    def _has_own_gradients(self, student: Stitch) -> bool:
        """False where the largest anchor is drawn and trains as the teacher already."""
        return not (self.args.train_teacher and student.key == self.largest.key)

    def _label_count(self, labels: Tensor) -> Tensor:
        return (labels[:, 1:] != IGNORED).sum()

    def _response_logits(
        self, model: nn.Module, inputs: dict, labels: Tensor, stitch: Stitch | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [labels, vocabulary] where a label is wanted, and those labels [labels]; of a plain model without a stitch."""
        how = {} if stitch is None else {"stitch_id": stitch.key}
        logits = model(**inputs, **how, use_cache=False).logits[:, :-1]
        wanted = labels[:, 1:].to(logits.device)
        return logits[wanted != IGNORED].float(), wanted[wanted != IGNORED]

    def _unreduced(self, model: nn.Module) -> contextlib.AbstractContextManager:
        return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()

    def _backward(self, role: str, loss: Tensor) -> None:
        """Adds to the gradients kept for `role`, and to no others; none where nothing on the route trains."""
        if not loss.requires_grad:
            return
        kept = self._kept[role]
        self._trained = self._trained or [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self._trained:
            parameter.grad = kept.get(parameter)
        self.accelerator.backward(loss)
        for parameter in self._trained:
            if parameter.grad is not None:
                kept[parameter] = parameter.grad
            parameter.grad = None

    def _complete_step(self, student: Stitch) -> None:
        """Sums all roles' gradients over ranks, reads the student's importance, and hands their sum to the optimiser."""
        told = [*self.step_losses, float(self.interruption.came)]
        losses = torch.tensor(told, device=self.args.device, dtype=torch.float64)
        self._sum_over_ranks([*(g for kept in self._kept.values() for g in kept.values()), losses])
        statistics = [tensor for tensor in self.model.stitching_layers.buffers() if tensor.is_floating_point()]
        self._sum_over_ranks(statistics, share=1 / self.accelerator.num_processes)
        *step_losses, interrupted = losses.tolist()
        check_step(self, student, step_losses, [g for kept in self._kept.values() for g in kept.values()])
        self.interruption.agreed = interrupted > 0
        own = self._kept["student" if self._has_own_gradients(student) else "teacher"]
        signals = self._signals(own, *step_losses)
        if self._is_rated(student):
            self.importance.update(student.key, signals)
        if self._is_taught(student):
            self._logged["loss_teacher"].append(signals.teacher_loss)
        self._logged[f"loss_interval_{self._group[student.key]}"].append(signals.loss)
        for role in self._kept:
            for parameter, gradient in self._kept[role].items():
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._forget_step()

    def _signals(self, gradients: Gradients, *losses: float) -> StepSignals:
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler is not None else 1.0
        device = self.args.device
        saliency = sum(
            ((g * p.detach()).abs().sum().to(device) for p, g in gradients.items()), torch.zeros((), device=device)
        )
        squares = sum((g.square().sum().to(device) for g in gradients.values()), torch.zeros((), device=device))
        return StepSignals(float(saliency) / scale, float(squares) ** 0.5 / scale, *losses)

    def _sum_over_ranks(self, tensors: list[Tensor], share: float = 1.0) -> None:
        """All ranks drew the same stitch, so they hold gradients of the same tensors, in the same order."""
        if self.accelerator.num_processes > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor.mul_(share))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As Transformers has it; pretrained weights that train take `anchor_lr_scale` times the rate (SN-Net 4: 0.1)."""
        made, optimizer = self.optimizer is None, super().create_optimizer(model)
        if made and self.model.stitch_lora is not None:
            part_phases(self.model, optimizer)
        if made and self.args.anchor_lr_scale != 1:
            slow_down_anchors(self.model, optimizer, self.args.anchor_lr_scale)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As Transformers has it; where anchors train first, each phase has its own warm-up and decay."""
        made = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if made and self.model.stitch_lora is not None:
            first = round(self.args.anchors_first * num_training_steps)
            self.lr_scheduler = scheduler = phase_scheduler(self.args, scheduler.optimizer, first, num_training_steps)
        return scheduler

    def _get_learning_rate(self) -> float:
        """What the log says: the rate of the phase that runs."""
        if self.model.stitch_lora is None:
            return super()._get_learning_rate()
        return max(group["lr"] for group in self.optimizer.param_groups)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As Transformers has it; what is refused is refused before a repository is made."""
        check_arguments(self.args)
        super().init_hf_repo(*args, **kwargs)
