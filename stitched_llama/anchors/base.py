"""The interface of a family: methods that call the parts of a backbone from outside, so that no backbone is forked."""

from typing import Any, Protocol

from torch import Tensor, nn


class Family(Protocol):
    """The methods that the route walk needs from a family. Implementations are stateless.

    `context` holds the inputs that all blocks of a forward share (mask, positions, cache); text and image families have their own.

    Attributes:
        layout: of a feature: `"tokens"` [batch, positions, width] or `"channels"` [batch, channels, height, width].
        head_modules: names of the modules after the last block, as tensor names begin.
    """

    layout: str
    head_modules: tuple[str, ...]

    def auto_class(self) -> type:
        """The Auto class that loads an anchor."""

    def block_names(self, anchor: nn.Module) -> list[str]:
        """The module names of the anchor's blocks, in order."""

    def adapted(self, block: nn.Module) -> nn.Module:
        """The module of a block that takes its keywords and holds the layers PST adapts."""

    def embed(self, anchor: nn.Module, inputs: Tensor) -> Tensor:
        """Everything before the first block."""

    def special_tokens(self, anchor: nn.Module) -> Tensor | None:
        """[1, tokens, width]: the class and distillation tokens as they enter the first block; None without any."""

    def approach(self, anchor: nn.Module, hidden: Tensor, block: int) -> Tensor:
        """The input of `block` from the output of the block before: the downsampling between two stages, if any."""

    def run(self, anchor: nn.Module, hidden: Tensor, start: int, stop: int, slot: int, context: Any) -> Tensor:
        """Blocks `[start, stop)`; `slot` is the position of block `start` in the route."""

    def head(self, anchor: nn.Module, hidden: Tensor) -> Tensor:
        """Everything after the last block."""
