"""Sizes of an anchor, read from its `config.json`, never from weights."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Feature:
    """The shape of a block's input or output.

    Attributes:
        width: channels.
        grid: (height, width) of an image's feature map; None for a token of text.
        special_tokens: class and distillation tokens in front of the map.
    """

    width: int
    grid: tuple[int, int] | None = None
    special_tokens: int = 0

    @property
    def positions(self) -> int:
        """Positions at which a linear map is applied: those of one image, or 1 for a token."""
        return self.special_tokens + (self.grid[0] * self.grid[1] if self.grid else 1)

    def __str__(self) -> str:
        grid = f"{self.grid[0]}x{self.grid[1]} places" if self.grid else "a token"
        return f"{self.width} channels at {grid}" + (f" + {self.special_tokens}" if self.special_tokens else "")


@dataclass(frozen=True)
class Part:
    """Sizes of one part of an anchor: a block, the embedding or the head.

    Attributes:
        params: all parameters of the part.
        linear_params: those of `params` that a weight quantiser (bitsandbytes) compresses.
        linear_rows: output rows of those linear layers; 8-bit keeps one float32 scale a row.
        macs: multiply-accumulates a token or an image; of a token without the attention over the context.
        macs_per_context_token: further multiply-accumulates a token for every token attended to.
        kv_width: numbers kept in the KV cache for a token.
        adapted: `(name, in_features, out_features)` of the layers with PST; in_features of a convolution includes its
            kernel.
    """

    params: int = 0
    linear_params: int = 0
    linear_rows: int = 0
    macs: int = 0
    macs_per_context_token: int = 0
    kv_width: int = 0
    adapted: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class AnchorSpec:
    """The sizes of one anchor.

    Attributes:
        family: name of the block contract (`model_type` of the config).
        embedding, head: parts before the first and after the last block.
        blocks: one part a block.
        enters, leaves: shapes of the input and output of each block.
        transitions: the layers between a block and the one before it (the downsampling of a staged family); skipped by a
            route that enters the block from another anchor.
        contract: fields that all anchors of a space must agree on, such as the size of the vocabulary or of the image.
        unit: of costs: `"token"` or `"image"`.
        tied: the head shares the matrix of the embedding; counted once if a route uses both.
        shared_with: the anchor of the space with the same embedding and head tensors; None if they are not shared.
        rebuild: (block, grid) -> the spec of this anchor when the input of that block has that grid; None where a block
            runs at one grid only.
    """

    family: str
    embedding: Part
    head: Part
    blocks: tuple[Part, ...]
    enters: tuple[Feature, ...]
    leaves: tuple[Feature, ...]
    transitions: tuple[Part, ...] = ()
    contract: dict[str, object] = field(default_factory=dict)
    unit: str = "token"
    tied: bool = False
    shared_with: int | None = None
    rebuild: Callable[[int, tuple[int, int]], "AnchorSpec"] | None = field(default=None, compare=False, repr=False)

    def entered_at(self, block: int, grid: tuple[int, int] | None) -> "AnchorSpec":
        """The spec, with its costs, for an input of `block` with another grid than it was trained for."""
        if grid == self.enters[block].grid:
            return self
        assert self.rebuild is not None, "only image anchors run at another grid"
        assert grid is not None, "an image anchor is entered by a map"
        return self.rebuild(block, grid)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Channels of the head's input."""
        return self.leaves[-1].width

    @property
    def params(self) -> int:
        shared = self.embedding.params if self.tied else 0
        parts = (*self.blocks, *self.transitions)
        return self.embedding.params + self.head.params - shared + sum(part.params for part in parts)

    def run(self, start: int, stop: int) -> list[Part]:
        """The blocks `[start, stop)` and the transitions between them."""
        between = self.transitions[start + 1 : stop] if self.transitions else ()
        return [*self.blocks[start:stop], *between]
