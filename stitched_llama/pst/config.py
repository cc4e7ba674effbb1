"""Settings of parameter-efficient stitch fine-tuning (PST)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from stitched_llama.space import StitchSpace

_CONVOLUTIONS = ("resnet", "mobilenet_v2", "convnext")


@dataclass(frozen=True)
class PSTConfig:
    """What trains (ESTA section 4.1): shared LoRA, a low-rank update of each stitching layer, a bias a stitch.

    Args:
        rank: LoRA rank on q, k, v, o; one for all anchors or one each. 0 leaves the attention frozen.
        stitch_rank: rank of a second LoRA on q, k, v, o that the stitches between the anchors share and the anchors do without; biases are
            then the stitches' alone too. Anchors train first, each as it would alone, and are frozen while the stitches train. 0 is
            the paper's way: one LoRA for anchors and stitches.
        stitching_rank: rank of the stitching layers' update; None is the paper's `in_width / 4`, or the tail's width where
            that is less; 0 freezes them, `"full"` trains them whole. What an adapter has beside its linear core trains unless
            they are frozen.
        stitch_bias: a bias of each stitch on q, k, v, o of every block of its route.
        dropout: on the input of the LoRA branches.
        full: all parameters of anchors and stitching layers train instead (SN-Net section 3.3); the bundle then holds
            them all.

    Raises:
        ValueError: `full` beside another setting, a `stitching_rank` that is no rank, a dropout outside 0..1, or a switch that is neither
            true nor false.
    """

    rank: int | tuple[int, ...] = 16
    stitch_rank: int = 0
    stitching_rank: int | str | None = None
    stitch_bias: bool = True
    dropout: float = 0.0
    full: bool = False

    def __post_init__(self):
        for name in ("stitch_bias", "full"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: true or false is needed")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}: a share of 0 or more, below 1, is needed")
        if self.full:
            given = [f.name for f in fields(self) if f.name != "full" and getattr(self, f.name) != f.default]
            if given:
                raise ValueError(
                    f"full trains everything, {', '.join(given)} would have no part: leave one of them out"
                )
        if isinstance(self.stitching_rank, str) and self.stitching_rank != "full":
            raise ValueError(
                f"stitching_rank is {self.stitching_rank!r}: a whole number, None (a quarter of the width) or 'full' is needed"
            )

    def ranks(self, space: StitchSpace) -> tuple[int, ...]:
        """The LoRA rank of each anchor.

        Raises:
            ValueError: as many ranks as anchors are needed, or a rank exceeds a width it adapts.
        """
        count = len(space.anchors)
        if self.full:
            return (0,) * count
        ranks = tuple(self.rank) if isinstance(self.rank, (tuple, list)) else (self.rank,) * count
        if len(ranks) != count:
            raise ValueError(f"{len(ranks)} ranks {ranks} for {count} anchors: give one rank, or one for each anchor")
        for index, (rank, anchor) in enumerate(zip(ranks, space.anchors)):
            narrowest = min(min(d_in, d_out) for block in anchor.blocks for _, d_in, d_out in block.adapted)
            _check_rank(rank, narrowest, f"rank of anchor {index}")
            _check_rank(self.stitch_rank, narrowest, f"stitch_rank on anchor {index}")
            if self.stitch_rank and anchor.family in _CONVOLUTIONS:
                raise ValueError(
                    f"stitch_rank {self.stitch_rank} is for linear layers, anchor {index} is a {anchor.family}: leave it 0"
                )
        return ranks

    def stitching_ranks(self, space: StitchSpace) -> dict[str, int | None]:
        """The rank of each stitching layer's update, by layer name; None where it trains whole."""
        if self.full or self.stitching_rank == "full":
            return dict.fromkeys(space.stitching_layers)
        ranks: dict[str, int | None] = {}
        for name, layer in space.stitching_layers.items():
            narrower = min(layer.in_width, layer.out_width)
            paper = max(1, min(layer.in_width // 4, narrower))
            ranks[name] = paper if self.stitching_rank is None else self.stitching_rank
            _check_rank(ranks[name], narrower, f"stitching_rank of layer {name}")
        return ranks

    def trainable_params(self, space: StitchSpace) -> dict[str, int]:
        """Numbers that train, by part, from the space alone; `print_trainable_parameters` counts the built tensors."""
        if self.full:
            stitching = sum(layer.params for layer in space.stitching_layers.values())
            return {"anchors": sum(anchor.params for anchor in space.anchors), "stitching_layers": stitching}
        lora = sum(
            rank * (d_in + d_out)
            for rank, anchor in zip(self.ranks(space), space.anchors)
            for block in anchor.blocks
            for _, d_in, d_out in block.adapted
        )
        stitching = 0
        for name, rank in self.stitching_ranks(space).items():
            layer = space.stitching_layers[name]
            beside = layer.params - layer.core_params if rank != 0 else 0
            core = layer.core_params if rank is None else rank * (layer.core_inputs + layer.out_width)
            stitching += core + beside
        bias = sum(
            d_out
            for stitch in space
            if not (self.stitch_rank and stitch.is_anchor)
            for anchor, block in stitch.blocks()
            for _, _, d_out in space.anchors[anchor].blocks[block].adapted
        )
        counts = {"lora": lora, "stitching_layers": stitching, "stitch_bias": bias if self.stitch_bias else 0}
        if self.stitch_rank:
            blocks = {block for stitch in space if not stitch.is_anchor for block in stitch.blocks()}
            adapted = [layer for anchor, block in blocks for layer in space.anchors[anchor].blocks[block].adapted]
            counts["stitch_lora"] = sum(self.stitch_rank * (d_in + d_out) for _, d_in, d_out in adapted)
        return counts

    def to_dict(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "PSTConfig":
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: an unknown field.
        """
        known = {f.name for f in fields(cls)}
        if unknown := set(content) - known:
            raise ValueError(f"PST settings hold unknown fields {sorted(unknown)}; known are {sorted(known)}")
        values = dict(content)
        if isinstance(values.get("rank"), list):
            values["rank"] = tuple(values["rank"])
        return cls(**values)


def _check_rank(rank: int | str, width: int, name: str) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank <= width:
        raise ValueError(f"{name} is {rank!r}, the width it adapts is {width}: choose a whole rank in 0..{width}")
