"""Kinds of stitching layers and their exact cost: the adapters and the rescaling of Traft and Cheney."""

from dataclasses import dataclass

Grid = tuple[int, int]

ADAPTERS = ("linear", "identity", "linear_relu", "conv3x3_relu", "bottleneck")
RESCALES = ("none", "bilinear", "strided")
ADAPTER_NORMS = ("none", "batch")
_REDUCTION = 4  # of a ResNet bottleneck


@dataclass(frozen=True)
class StitchingLayerSpec:
    """A stitching layer: the map from a block output of the source anchor to a block input of the target anchor.

    Attributes:
        name: the value of `Junction.layer`.
        in_width, out_width: channels.
        adapter: `"linear"` (1x1, the default), `"linear_relu"`, `"conv3x3_relu"`, or `"bottleneck"`: a linear shortcut
            beside a branch of 1x1, 3x3 and 1x1 convolutions, a quarter as wide.
        rescale: `"none"`, `"bilinear"` (interpolated before the map), `"strided"` (the map itself takes strides).
        norm: `"batch"` normalises before and after.
        in_grid, out_grid: (height, width) of the source block's output, and that the target block was trained for; None for
            text. They differ only across stages. Without rescaling the target runs at `in_grid`.
        special_tokens: class and distillation tokens of both sides; each is mapped as an image of one position.

    Source: Traft and Cheney, sections 2 and 3; SN-Net section 3.2 has `"linear"` alone.
    """

    name: str
    in_width: int
    out_width: int
    adapter: str = "linear"
    rescale: str = "none"
    norm: str = "none"
    in_grid: Grid | None = None
    out_grid: Grid | None = None
    special_tokens: int = 0

    @property
    def tail_grid(self) -> Grid | None:
        """The grid at which the target blocks run."""
        return self.in_grid if self.rescale == "none" else self.out_grid

    @property
    def step(self) -> int:
        """Stride of the map."""
        return _step(self.in_grid, self.out_grid) if self.rescale == "strided" else 1

    @property
    def inner_width(self) -> int:
        """Channels inside the branch of a bottleneck."""
        return max(1, self.out_width // _REDUCTION)

    @property
    def core_inputs(self) -> int:
        """Inputs of one output of the core map."""
        return self.in_width * (9 if self.adapter == "conv3x3_relu" else 1)

    @property
    def core_params(self) -> int:
        """Parameters of the core map, which least squares fits and PST updates."""
        return self.core_inputs * self.out_width + self.out_width

    @property
    def params(self) -> int:
        inner = self.inner_width
        branch = self.in_width * inner + inner + 9 * inner * inner + inner + inner * self.out_width + self.out_width
        norms = 2 * (self.in_width + self.out_width) if self.norm == "batch" else 0
        return self.core_params + norms + (branch if self.adapter == "bottleneck" else 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates an image (or token); interpolation and norms are not counted, as in FLOP counters."""
        after = self.special_tokens + _positions(self.tail_grid)
        before = self.special_tokens + _positions(self.in_grid) if self.rescale == "strided" else after
        core = after * self.core_inputs * self.out_width
        inner = self.inner_width
        branch = before * self.in_width * inner + after * (9 * inner * inner + inner * self.out_width)
        return core + (branch if self.adapter == "bottleneck" else 0)


def check_adapter(adapter: str, rescale: str, norm: str) -> None:
    """Rejects an unknown option.

    Raises:
        ValueError: names the option, its value and the known ones.
    """
    for name, value, known in (
        ("adapter", adapter, ADAPTERS),
        ("rescale", rescale, RESCALES),
        ("adapter_norm", norm, ADAPTER_NORMS),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown; one of {', '.join(known)} is needed")


def strides_reach(in_grid: Grid | None, out_grid: Grid | None) -> bool:
    """Whether one stride for both axes maps `in_grid` to `out_grid`."""
    if in_grid is None or out_grid is None:
        return in_grid == out_grid
    step = _step(in_grid, out_grid)
    return tuple(-(-side // step) for side in in_grid) == tuple(out_grid)


def _step(in_grid: Grid | None, out_grid: Grid | None) -> int:
    return 1 if in_grid is None or out_grid is None else max(-(-a // b) for a, b in zip(in_grid, out_grid))


def _positions(grid: Grid | None) -> int:
    return grid[0] * grid[1] if grid else 1
