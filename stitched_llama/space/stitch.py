"""The values of a space: segments, junctions and stitches."""

from dataclasses import dataclass
from typing import Any

KEYS = (
    "A key names a stitch by its route: 0[0:26]>1[33:40] runs blocks 0 to 25 of anchor 0, the smallest, then, through a stitching "
    "layer, blocks 33 to 39 of anchor 1; 1[0:40] is anchor 1 alone. An id numbers the stitches from 0, ascending in parameters."
)


@dataclass(frozen=True)
class Segment:
    """Blocks `[start, stop)` of anchor number `anchor`."""

    anchor: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.anchor}[{self.start}:{self.stop}]"

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Junction:
    """The point where a route goes from block `head_stop - 1` of the source anchor `head` to block `tail_start` of the target `tail`.

    `layer` is the name of its stitching layer, which several junctions may share; None is the identity.
    """

    layer: str | None
    head: int
    head_stop: int
    tail: int
    tail_start: int

    def __str__(self) -> str:
        return f"{self.head}[:{self.head_stop}]>{self.tail}[{self.tail_start}:]"


@dataclass(frozen=True)
class Stitch:
    """One route through the anchors, with its exact cost before PST.

    The cost does not include PST: a loaded model also holds LoRA, updates and biases in float32, at 7B/13B and rank 16 up to
    0.8 % of `weight_bytes` in bfloat16 and 1.5 % in 8 bits; layers whose weights all train take 4 bytes a parameter.

    Attributes:
        stitch_id: contiguous from 0, ascending in `params`: a larger id is a larger model.
        key: readable and stable, such as `0[0:26]>1[33:40]`.
        segments, junctions: the route, with a junction between each two segments.
        params: blocks, embedding, final norm, head and stitching layers.
        macs: multiply-accumulates for one token at the space's `context_tokens`, or for one image.
        weight_bytes: bytes of `params` at the space's dtype and quantisation.
        kv_bytes_per_token: bytes of the KV cache for each token; 0 for images.
        unit: of `macs`: `"token"` or `"image"`.
    """

    stitch_id: int
    key: str
    segments: tuple[Segment, ...]
    junctions: tuple[Junction, ...]
    params: int
    macs: int
    weight_bytes: int
    kv_bytes_per_token: int
    unit: str = "token"

    @property
    def is_anchor(self) -> bool:
        return len(self.segments) == 1

    @property
    def depth(self) -> int:
        """Blocks on the route."""
        return sum(len(segment) for segment in self.segments)

    @property
    def layers(self) -> list[str]:
        """Names of the stitching layers on the route; identity junctions have none."""
        return [junction.layer for junction in self.junctions if junction.layer is not None]

    def blocks(self) -> list[tuple[int, int]]:
        """`(anchor, block)` along the route; the position in the list is the KV cache slot."""
        return [(segment.anchor, block) for segment in self.segments for block in range(segment.start, segment.stop)]

    def to_dict(self) -> dict[str, Any]:
        """The public JSON form."""
        costs = {"params": self.params, f"macs_per_{self.unit}": self.macs, "weight_bytes": self.weight_bytes}
        if self.unit == "token":
            costs["kv_bytes_per_token"] = self.kv_bytes_per_token
        segments = [[segment.anchor, segment.start, segment.stop] for segment in self.segments]
        return {"stitch_id": self.stitch_id, "key": self.key, **costs, "segments": segments}


def route_key(segments: tuple[Segment, ...]) -> str:
    return ">".join(map(str, segments))
