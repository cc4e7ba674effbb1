"""The contract of a family: four verbs that reach into a backbone from outside, so that no backbone is forked."""

from typing import Any, Protocol

from torch import Tensor, nn


class Family(Protocol):
    """What the route walk asks of a family. Implementations hold no state.

    `context` is what all blocks of one forward share (mask, positions, cache); a family defines its own.

    Attributes:
        blocks_module, embedding_modules, head_modules: where an anchor's parts lie, as its tensor names begin.
    """

    blocks_module: str
    embedding_modules: tuple[str, ...]
    head_modules: tuple[str, ...]

    def blocks(self, anchor: nn.Module) -> nn.ModuleList:
        """The anchor's blocks, in order."""

    def attention(self, block: nn.Module) -> nn.Module:
        """The module of a block whose linear layers PST adapts."""

    def embed(self, anchor: nn.Module, inputs: Tensor) -> Tensor:
        """Everything before the first block."""

    def run(self, anchor: nn.Module, hidden: Tensor, start: int, stop: int, slot: int, context: Any) -> Tensor:
        """Blocks `[start, stop)`; `slot` is the position of block `start` in the route."""

    def head(self, anchor: nn.Module, hidden: Tensor) -> Tensor:
        """Everything after the last block."""
