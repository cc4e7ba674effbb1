"""The base class of image families: blocks in stages, run one by one with the layers between the stages."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn


@dataclass
class ImageContext:
    """Inputs that all blocks of a forward share.

    Attributes:
        stitch_updates: for each slot the updates of its adapted layers (`pst.Update`); None without any.
        checkpoint: runs a block so that its activations are computed again in the backward pass; None keeps them.
    """

    stitch_updates: Sequence[tuple[Any, ...]] | None = None
    checkpoint: Callable[..., Tensor] | None = None


class ImageFamily(ABC):
    """`Family` for a `...ForImageClassification`; subclasses name the parts of the backbone."""

    layout = "channels"
    head_modules: tuple[str, ...] = ("classifier",)

    def auto_class(self) -> type:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    @abstractmethod
    def stages(self, anchor: nn.Module) -> list[tuple[str, nn.Module]]:
        """Name and module of each list of blocks."""

    def block_names(self, anchor: nn.Module) -> list[str]:
        return [f"{name}.{index}" for name, blocks in self.stages(anchor) for index in range(len(blocks))]

    def adapted(self, block: nn.Module) -> nn.Module:
        return block

    def special_tokens(self, anchor: nn.Module) -> Tensor | None:
        return None

    def between(self, anchor: nn.Module, stage: int, hidden: Tensor) -> Tensor:
        """The layers before the first block of a stage, for a route that comes from the stage before."""
        return hidden

    def approach(self, anchor: nn.Module, hidden: Tensor, block: int) -> Tensor:
        for stage, (_, blocks) in enumerate(self.stages(anchor)):
            if block == 0:
                return self.between(anchor, stage, hidden) if stage else hidden
            block -= len(blocks)
            if block < 0:
                return hidden
        return hidden

    def classify(self, anchor: nn.Module, pooled: Tensor) -> Tensor:
        """Logits [batch, classes] of pooled features [batch, width]; a head that trains is float32."""
        return anchor.classifier(pooled.to(next(anchor.classifier.parameters()).dtype))

    def step(self, block: nn.Module, hidden: Tensor, **extra: Any) -> Tensor:
        """One block."""
        return block(hidden, **extra)

    def run(self, anchor: nn.Module, hidden: Tensor, start: int, stop: int, slot: int, context: ImageContext) -> Tensor:
        blocks = [block for _, stage in self.stages(anchor) for block in stage]
        for index in range(start, stop):
            if index > start:
                hidden = self.approach(anchor, hidden, index)
            updates = context.stitch_updates
            extra = {} if updates is None else {"stitch_updates": updates[slot + index - start]}
            step = partial(self.step, blocks[index], **extra)
            itself = hasattr(blocks[index], "gradient_checkpointing")  # then Transformers checkpoints it
            hidden = step(hidden) if itself or context.checkpoint is None else context.checkpoint(step, hidden)
        return hidden
