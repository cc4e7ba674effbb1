"""Parts shared by the specs of image classifiers. Costs are for one image."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .fields import Config, label_count, pair, positive
from .spec import AnchorSpec, Feature, Part

Entry = tuple[int, tuple[int, int]]  # a block, and the grid of its input where that comes from another anchor


def staged(
    config: Config,
    stem: Part,
    blocks: Sequence[Part],
    enters: Sequence[Feature],
    leaves: Sequence[Feature],
    transitions: Sequence[Part],
    head: Part,
) -> AnchorSpec:
    return AnchorSpec(
        family=config["model_type"],
        embedding=stem,
        head=head,
        blocks=tuple(blocks),
        enters=tuple(enters),
        leaves=tuple(leaves),
        transitions=tuple(transitions),
        contract=contract(config),
        unit="image",
    )


def grid_at(entry: Entry | None, first: int, count: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The grid of blocks `[first, first + count)`: that of `entry` if its block is one of them, else `grid`."""
    return entry[1] if entry is not None and first <= entry[0] < first + count else grid


def downsampled(grid: tuple[int, int], stride: int) -> tuple[int, int]:
    """The grid after a padded convolution of that stride: each side divided and rounded up."""
    return -(-grid[0] // stride), -(-grid[1] // stride)


def patch_grid(config: Config, patch: tuple[int, int]) -> tuple[int, int]:
    """Patches along height and width.

    Raises:
        ValueError: the image is smaller than a patch.
    """
    size = pair(config, "image_size", 224)
    grid = size[0] // patch[0], size[1] // patch[1]
    if min(grid) < 1:
        raise ValueError(f"image_size {size} is smaller than patch_size {patch}: no patch is left")
    return grid


def contract(config: Config) -> dict[str, Any]:
    size = pair(config, "image_size", 224)
    return {
        "image_size": size[0] if size[0] == size[1] else list(size),
        "num_channels": positive(config, "num_channels", 3),
        "num_labels": label_count(config),
    }


def linear_sizes(linears: list[tuple[int, int, bool]], norms: int) -> dict[str, int]:
    """Parameters of a block: its linear layers and everything else (`norms`)."""
    matrices = sum(d_in * d_out for d_in, d_out, _ in linears)
    biases = sum(d_out for _, d_out, bias in linears if bias)
    return {
        "params": matrices + biases + norms,
        "linear_params": matrices,
        "linear_rows": sum(d_out for _, d_out, _ in linears),
    }


def classifier(width: int, config: Config) -> Part:
    """A linear classifier."""
    labels = label_count(config)
    return Part(params=width * labels + labels, macs=width * labels)


def norm_and_classifier(width: int, config: Config) -> Part:
    """A norm and a linear classifier."""
    linear = classifier(width, config)
    return replace(linear, params=linear.params + 2 * width)
