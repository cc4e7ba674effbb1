"""Options of `StitchSpace` as command-line options, of the recipes and of `stitched-llama space`."""

from dataclasses import dataclass, field
from typing import Any

from .adapters import ADAPTER_NORMS, ADAPTERS, RESCALES
from .given import parse_junctions
from .space import DIRECTIONS, PAIRS, SPACE_OPTIONS


@dataclass
class SpaceArguments:
    """Options of `StitchSpace`."""

    kernel_size: int = field(default=1, metadata={"help": "Blocks of the sliding window."})
    stride: int = field(default=1, metadata={"help": "Stride of the sliding window."})
    direction: str = field(
        default="fast-to-slow", metadata={"help": f"Direction of the routes: {', '.join(DIRECTIONS)}."}
    )
    pairs: str = field(default="nearest", metadata={"help": f"Which anchors are joined: {', '.join(PAIRS)}."})
    adapter: str | None = field(
        default=None,
        metadata={
            "help": f"Kind of stitching layer (linear; identity for aligned junctions of equal width): {', '.join(ADAPTERS)}."
        },
    )
    rescale: str = field(
        default="none", metadata={"help": f"How stitching layers change the resolution: {', '.join(RESCALES)}."}
    )
    adapter_norm: str = field(
        default="none", metadata={"help": f"Norms before and after stitching layers: {', '.join(ADAPTER_NORMS)}."}
    )
    across_stages: bool = field(default=False, metadata={"help": "Also join stages of different resolution."})
    junctions: list[str] = field(
        default_factory=lambda: ["nearest"],
        metadata={
            "help": "nearest (by depth), aligned (for a small anchor made by shrink), similar (measured, for two text anchors), or pairs of "
            "blocks such as 3:8."
        },
    )
    routes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Explicit stitches by key, such as 1[0:5]>0[3:5]>1[9:30], or greedy: for each size the route of lowest loss found by "
            "a greedy search (for a small anchor made by shrink at equal width)."
        },
    )

    @property
    def is_measured(self) -> bool:
        """Whether junctions or routes are found by a measurement of the anchors."""
        return self.junctions == ["similar"] or self.routes == ["greedy"]

    def options(self) -> dict[str, Any]:
        """Options of `StitchSpace`; `similar` junctions and `greedy` routes are not included, as they are measured first.

        Raises:
            ValueError: junctions that cannot be read.
        """
        found = {name: getattr(self, name) for name in SPACE_OPTIONS if name not in ("junctions", "routes")}
        junctions = None if self.junctions == ["similar"] else parse_junctions(self.junctions)
        routes = None if self.routes == ["greedy"] else self.routes or None
        return found | {"junctions": junctions, "routes": routes}


@dataclass
class ImageSpaceArguments(SpaceArguments):
    """`SpaceArguments` with the kernel of ESTA and SN-Net for plain ViTs, and the size of the images.

    Raises:
        ValueError: junctions or routes are to be measured, which is for text anchors.
    """

    kernel_size: int = field(default=2, metadata={"help": "Blocks of the sliding window."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images, for anchors that take any (DINOv2, ConvNeXt, ...)."}
    )

    def __post_init__(self) -> None:
        if self.is_measured:
            raise ValueError(
                "--junctions similar and --routes greedy measure text anchors: give junctions or routes one by one"
            )

    def options(self) -> dict[str, Any]:
        """Options of `from_anchors`.

        Raises:
            ValueError: junctions that cannot be read.
        """
        return super().options() | {"image_size": self.image_size}
