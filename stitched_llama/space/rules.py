"""Rules for junctions: the pairings of SN-Net and ESTA, from depths and resolutions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from .spec import Feature


@dataclass(frozen=True)
class Pairing:
    """`source[0:source_stop] > target[target_start:]`, joined by stitching layer `layer` of this pair of anchors."""

    source_stop: int
    target_start: int
    layer: int | str


def pairings(
    leaves: Sequence[Feature],
    enters: Sequence[Feature],
    kernel_size: int,
    stride: int,
    rescaled: bool = False,
    across_stages: bool = False,
) -> list[Pairing]:
    """All pairings from a source anchor with block outputs `leaves` to a target anchor with block inputs `enters`.

    Blocks are paired at equal resolution; with `rescaled`, two anchors of one resolution each are paired at any. If a resolution has
    as many block outputs as inputs: paired stitching with sliding windows (SN-Net, section 3.3). Else: nearest depth (ESTA, section
    5.2 with 32 and 40 blocks); a wider kernel slides over the mapped positions. A decoder and a plain ViT have one resolution, a
    staged family one for each stage; a stage of fewer blocks than the kernel is one window.

    With `across_stages` also from the last block of each stage to the first of every stage of lower resolution, with a separate
    stitching layer (Traft and Cheney, figure 1).

    Raises:
        ValueError: a depth below 2, a kernel or stride outside the shallower anchor, or no junction is possible; names
            the nearest resolutions.
    """
    shallow = min(len(leaves), len(enters))
    if shallow < 2:
        raise ValueError(f"an anchor of {shallow} block cannot be stitched: at least 2 are needed")
    stages = [(_at(leaves, grid), _at(enters, grid)) for grid in dict.fromkeys(feature.grid for feature in leaves)]
    stages = [(sources, targets) for sources, targets in stages if sources and targets]
    plain = len({feature.grid for feature in leaves}) == len({feature.grid for feature in enters}) == 1
    if not stages and plain and rescaled:
        stages = [(list(range(len(leaves))), list(range(len(enters))))]
    gaps = _gaps(leaves, enters) if across_stages else []
    if not stages and not gaps:
        raise ValueError(_impossible(leaves, enters, plain))
    widest = max((min(map(len, pair)) for pair in stages), default=shallow)
    if not 1 <= kernel_size <= widest or not 1 <= stride <= widest:
        raise ValueError(
            f"kernel_size {kernel_size} and stride {stride} must lie in 1..{widest} (blocks of the shallower anchor)"
        )
    found = []
    for sources, targets in stages:
        shallow = min(len(sources), len(targets))
        rule = _windows if len(sources) == len(targets) else _nearest_depth
        for stop, start, layer in rule(len(sources), len(targets), min(kernel_size, shallow), min(stride, shallow)):
            found.append(Pairing(sources[stop - 1] + 1, targets[start], sources[0] + layer))
    return found + gaps


def _gaps(leaves: Sequence[Feature], enters: Sequence[Feature]) -> list[Pairing]:
    """From the last block with an output of each resolution to the first with an input of each lower one."""
    last = {feature.grid: index for index, feature in enumerate(leaves)}
    first = {feature.grid: index for index, feature in reversed(list(enumerate(enters)))}
    found = []
    for high, a in last.items():
        for low, b in first.items():
            if high and low and low != high and low[0] <= high[0] and low[1] <= high[1]:
                found.append(Pairing(a + 1, b, f"{a}to{b}"))
    return found


def _impossible(leaves: Sequence[Feature], enters: Sequence[Feature], plain: bool) -> str:
    """The message for anchors that cannot be joined, with the nearest resolutions."""
    choices = [
        (abs(math.log(math.prod(a.grid) / math.prod(b.grid))), i, a, b)
        for i, (a, b) in enumerate(product(leaves, enters))
        if a.grid and b.grid
    ]
    advice = "choose anchors with a resolution in common"
    if choices:
        *_, a, b = min(choices)  # the first pair of the smallest ratio
        how = "rescale='bilinear'" if plain else "across_stages=True and rescale='bilinear'"
        if plain or _gaps(leaves, enters):
            advice = f"nearest are {a} and {b}: join them with {how}, or {advice}"
        else:
            advice = f"nearest are {a} and {b}: {advice}"
    return (
        f"no junction is possible: blocks of the first anchor leave {', '.join(_distinct(leaves))}, and those of the "
        f"second are entered at {', '.join(_distinct(enters))}; {advice}"
    )


def _at(features: Sequence[Feature], grid: tuple[int, int] | None) -> list[int]:
    return [index for index, feature in enumerate(features) if feature.grid == grid]


def _distinct(features: Sequence[Feature]) -> list[str]:
    return list(dict.fromkeys(map(str, features)))


def _windows(depth: int, _: int, kernel_size: int, stride: int) -> list[tuple[int, int, int]]:
    """(source stop, target start, layer): in each window every (a, b) gives `source[0:a+1] > target[b:]`; a pair in several windows
    belongs to the first."""
    found: dict[tuple[int, int], tuple[int, int, int]] = {}
    for layer, first in enumerate(range(0, depth - kernel_size + 1, stride)):
        window = range(first, first + kernel_size)
        for a in window:
            for b in window:
                found.setdefault((a, b), (a + 1, b, layer))
    return list(found.values())


def _nearest_depth(source_depth: int, target_depth: int, kernel_size: int, stride: int) -> list[tuple[int, int, int]]:
    """(source stop, target start, layer): `source[0:floor(m*S/T)+1] > target[m+1:]` for m = 0 .. T-2 at depths S and T; one stitching
    layer for each source block."""
    positions = range(target_depth - 1)
    kernel_size = min(kernel_size, len(positions))
    found: dict[tuple[int, int], tuple[int, int, int]] = {}
    for first in range(0, len(positions) - kernel_size + 1, stride):
        window = positions[first : first + kernel_size]
        for m in window:
            a = m * source_depth // target_depth
            for n in window:
                found.setdefault((a, n + 1), (a + 1, n + 1, a))
    return list(found.values())
