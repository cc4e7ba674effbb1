"""Exact cost of a route by arithmetic on specs; tests compare it with `numel()` and a FLOP counter."""

from collections.abc import Sequence
from dataclasses import dataclass

from .adapters import StitchingLayerSpec
from .spec import AnchorSpec, Part
from .stitch import Segment

BYTES_PER_NUMBER = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZATIONS = (None, "8bit", "4bit")
_NF4_BLOCK = 64  # bitsandbytes' block: one float32 scale for 64 weights


@dataclass(frozen=True)
class Precision:
    """dtype and quantisation of the weights and the KV cache.

    Attributes:
        dtype: of all weights that are not quantised, and of the KV cache.
        quantization: `None`, `"8bit"` (LLM.int8) or `"4bit"` (NF4), of the blocks' linear layers.
        context_tokens: tokens attended to, for the MACs of a token; 0 omits attention over the context.

    Raises:
        ValueError: a dtype or quantisation that is not known.
    """

    dtype: str = "bfloat16"
    quantization: str | None = None
    context_tokens: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in BYTES_PER_NUMBER:
            raise ValueError(f"dtype {self.dtype!r} is unknown; one of {', '.join(BYTES_PER_NUMBER)} is needed")
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization {self.quantization!r} is unknown; None, '8bit' or '4bit' is needed")
        if self.context_tokens < 0:
            raise ValueError(f"context_tokens is {self.context_tokens}; it cannot be negative")

    def weight_bytes(self, part: Part) -> int:
        number = BYTES_PER_NUMBER[self.dtype]
        if self.quantization is None:
            return part.params * number
        rest = (part.params - part.linear_params) * number
        if self.quantization == "8bit":
            return rest + part.linear_params + 4 * part.linear_rows
        return rest + part.linear_params // 2 + 4 * (-(-part.linear_params // _NF4_BLOCK))


@dataclass(frozen=True)
class Cost:
    params: int
    macs: int
    weight_bytes: int
    kv_bytes_per_token: int


def route_cost(
    anchors: Sequence[AnchorSpec],
    segments: Sequence[Segment],
    stitching_layers: Sequence[StitchingLayerSpec | None],
    precision: Precision,
) -> Cost:
    """Cost of one route before PST: embedding of the first anchor, blocks, stitching layers (None for an identity junction), head of
    the last anchor. A matrix that is both embedding and head, or shared by two anchors, is counted once."""
    specs = [anchors[segments[0].anchor]]
    for segment, layer in zip(segments[1:], stitching_layers):
        anchor = anchors[segment.anchor]
        specs.append(anchor if layer is None else anchor.entered_at(segment.start, layer.tail_grid))
    first, last = specs[0], specs[-1]
    blocks = [part for s, spec in zip(segments, specs) for part in spec.run(s.start, s.stop)]
    number = BYTES_PER_NUMBER[precision.dtype]
    params = macs = weight = 0
    for part in (first.embedding, *blocks, last.head):
        params += part.params
        macs += part.macs + part.macs_per_context_token * precision.context_tokens
        weight += precision.weight_bytes(part)
    for layer in filter(None, stitching_layers):
        params += layer.params
        macs += layer.macs
        weight += layer.params * number
    owners = [anchors[s.anchor].shared_with for s in (segments[0], segments[-1])]
    owners = [s.anchor if owner is None else owner for s, owner in zip((segments[0], segments[-1]), owners)]
    if last.tied and owners[0] == owners[1]:
        params -= last.embedding.params
        weight -= last.embedding.params * number
    return Cost(params, macs, weight, sum(part.kv_width for part in blocks) * number)
