"""The loss that makes a small model stitchable: distillation from the large one, with its block outputs aligned."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from stitched_llama.anchors import FAMILIES, DecoderContext, ImageContext, LlamaFamily


class ShrinkDistillation(nn.Module):
    """A student and its frozen teacher; `forward` returns the loss of a batch.

    The loss is the Kullback-Leibler divergence of the student's logits from the teacher's, plus `alignment_weight` times the
    mean cosine distance of each student block's output to the output of the teacher block it is to reproduce, plus
    `label_weight` times cross-entropy.

    With probability `mixed_share` a batch runs a mixed route instead of the student alone: the student's first blocks and then the
    teacher's, or, at equal width for half of these batches, student blocks at random positions among the teacher's. So teacher blocks
    are trained on student outputs and student blocks on teacher outputs, as in a stitch.

    Args:
        student, teacher: of one class.
        target_blocks, channels: see `Cut`; with channels outputs are compared after a learned projection.
        logit_share: share of the positions whose logits are compared, sampled for each batch.
        freeze_embeddings: at equal width keep the teacher's input embedding and head frozen, so that both models share them.

    `state_dict` holds the trained parameters only, and none of the teacher.

    Raises:
        ValueError: an embedding that is to be shared is not the teacher's.

    Source: boomerang distillation (arXiv 2510.05064) for the alignment; the mixed routes are our own.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        target_blocks: Sequence[int],
        channels: Tensor | None = None,
        alignment_weight: float = 2.0,
        label_weight: float = 0.0,
        mixed_share: float = 0.5,
        logit_share: float = 0.5,
        freeze_embeddings: bool = True,
    ):
        super().__init__()
        self.student, self.config = student, student.config
        self._teacher = [teacher.requires_grad_(False).eval()]  # in a list, so that it is not a submodule
        self.family: Any = FAMILIES[student.config.model_type]
        self.target_blocks = list(target_blocks)
        self.starts = [0, *(block + 1 for block in self.target_blocks[:-1])]
        self.alignment_weight, self.label_weight = alignment_weight, label_weight
        self.mixed_share, self.logit_share = mixed_share, logit_share
        self.is_text = isinstance(self.family, LlamaFamily)
        self.projections: nn.ModuleList | None = None
        if channels is not None:
            self.projections = nn.ModuleList(
                _selecting(channels, teacher.config.hidden_size) for _ in self.target_blocks[:-1]
            )
        elif freeze_embeddings and self.is_text:
            for get in ("get_input_embeddings", "get_output_embeddings"):
                own, other = (getattr(model, get)().weight for model in (student, teacher))
                if not torch.equal(own.float().to(other.device), other.float()):
                    raise ValueError(
                        f"embedding or head of the student ({list(own.shape)}) is not the teacher's, which it is to share: give the model "
                        "that it was cut from, or freeze_embeddings=False"
                    )
                getattr(student, get)().requires_grad_(False)

    @property
    def teacher(self) -> PreTrainedModel:
        return self._teacher[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The trained parameters by name, without tied and frozen ones."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.student.gradient_checkpointing_enable(*args, **kwargs)
        self.teacher.gradient_checkpointing_enable(*args, **kwargs)

    def draw(self) -> list[bool]:
        """For each student block whether the next batch runs it instead of the teacher's blocks; all True in evaluation."""
        depth = len(self.target_blocks)
        if not self.training or torch.rand(()) >= self.mixed_share:
            return [True] * depth
        if self.projections is not None or torch.rand(()) < 0.5:
            stop = int(torch.randint(1, depth + 1, ()))
            return [index < stop for index in range(depth)]
        taken = (torch.rand(depth) < torch.rand(())).tolist()
        return taken if any(taken) else self.draw()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`loss`, and detached `divergence` and `alignment`; all scalars.

        Shapes: input_ids, attention_mask, labels [batch, tokens]; or pixel_values [batch, channels, height, width] and labels
        [batch].
        """
        inputs = input_ids if self.is_text else pixel_values
        taken = self.draw()
        depth, first = len(taken), taken.index(True)
        with torch.no_grad():
            hidden = self.family.embed(self.teacher, inputs)
            context = self._context(hidden, attention_mask)
            states = [hidden]  # teacher: the input of each group of blocks, and the last output
            for index in range(depth):
                states.append(self._run_teacher(states[-1], self.starts[index], self.target_blocks[index] + 1, context))
        hidden = self.family.embed(self.student, inputs) if first == 0 else states[first]
        distances = []
        for index in range(first, depth):
            if taken[index]:
                hidden = self.family.run(self.student, hidden, index, index + 1, index, context)
                if index < depth - 1:
                    distances.append(self._distance(self._projected(hidden, index), states[index + 1], attention_mask))
            else:
                hidden = self._projected(hidden, index - 1) if taken[index - 1] else hidden
                hidden = self._run_teacher(hidden, self.starts[index], self.target_blocks[index] + 1, context)
        last = self.student if taken[-1] else self.teacher
        divergence, label_loss = self._logit_losses(last, hidden, states[-1], attention_mask, labels)
        alignment = torch.stack(distances).mean() if distances else divergence.new_zeros(())
        loss = divergence + self.alignment_weight * alignment
        if self.label_weight:
            loss = loss + self.label_weight * label_loss
        return {"loss": loss, "divergence": divergence.detach(), "alignment": alignment.detach()}

    def _context(self, embedded: Tensor, attention_mask: Tensor | None) -> Any:
        if not self.is_text:
            return ImageContext()
        positions = torch.arange(embedded.shape[1], device=embedded.device)[None]
        mask = create_causal_mask(
            config=self.teacher.config,
            inputs_embeds=embedded,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=positions,
        )
        return DecoderContext(mask, positions)

    def _run_teacher(self, hidden: Tensor, start: int, stop: int, context: Any) -> Tensor:
        return self.family.run(self.teacher, hidden, start, stop, start, context)

    def _projected(self, hidden: Tensor, index: int) -> Tensor:
        return hidden if self.projections is None else self.projections[index](hidden)

    def _distance(self, found: Tensor, wanted: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Mean cosine distance; for text without the first position, whose activations are massive and nearly constant."""
        distances = 1 - F.cosine_similarity(found.float(), wanted.float(), dim=-1)
        if not self.is_text:
            return distances.mean()
        if attention_mask is None:
            return distances[:, 1:].mean()
        kept = attention_mask.bool() & (attention_mask.cumsum(1) > 1)
        return (distances * kept).sum() / kept.sum().clamp_min(1)

    def _logit_losses(
        self, last: PreTrainedModel, hidden: Tensor, teacher_hidden: Tensor, mask: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Divergence from the teacher's logits and cross-entropy, at `logit_share` of the positions."""
        zero = hidden.new_zeros((), dtype=torch.float32)
        if not self.is_text:
            logits = self.family.head(last, hidden).float()
            with torch.no_grad():
                teacher_logits = self.family.head(self.teacher, teacher_hidden).float()
            label_loss = zero if labels is None else F.cross_entropy(logits, labels)
            return _divergence(logits, teacher_logits), label_loss
        rows = hidden.flatten(0, 1)
        kept = torch.arange(len(rows)) if mask is None else mask.flatten().cpu().nonzero()[:, 0]
        kept = kept[torch.randperm(len(kept))[: max(1, round(self.logit_share * len(kept)))]].to(rows.device)
        logits = self.family.head(last, rows[kept]).float()
        with torch.no_grad():
            teacher_logits = self.family.head(self.teacher, teacher_hidden.flatten(0, 1)[kept]).float()
        label_loss = zero
        if self.label_weight and labels is not None:
            following = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()[kept]
            if (following != -100).any():
                label_loss = F.cross_entropy(logits, following)
        return _divergence(logits, teacher_logits), label_loss


def _divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over rows of the Kullback-Leibler divergence of `logits` from `teacher_logits`, [rows, classes] each."""
    wanted = teacher_logits.softmax(-1)
    entropy = -torch.special.xlogy(wanted, wanted).sum(-1)
    # as a dot product a row: no further tensor of the vocabulary's size is stored for the backward pass
    return (-torch.linalg.vecdot(wanted, logits.log_softmax(-1)) - entropy).mean()


def _selecting(channels: Tensor, width: int) -> nn.Linear:
    """A linear layer initialised to write each kept channel to its index in the large model."""
    layer = nn.Linear(len(channels), width)
    with torch.no_grad():
        layer.weight.zero_()[channels, torch.arange(len(channels))] = 1.0
        layer.bias.zero_()
    return layer
