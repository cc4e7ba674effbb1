"""Which blocks may be joined: the pairing rules of SN-Net and ESTA, on depths alone."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pairing:
    """`head[0:head_stop] > tail[tail_start:]`, joined by the stitching layer number `layer` of the pair."""

    head_stop: int
    tail_start: int
    layer: int


def pairings(head_depth: int, tail_depth: int, kernel_size: int, stride: int) -> list[Pairing]:
    """All routes from one anchor to another.

    Equal depth: paired stitching with sliding windows (SN-Net, section 3.3). Unequal depth: nearest-depth map
    (ESTA, section 5.2 with 32 and 40 blocks); a wider kernel slides over the mapped positions.

    Raises:
        ValueError: a depth below 2, or a kernel or stride outside the shallower anchor.
    """
    shallow = min(head_depth, tail_depth)
    if shallow < 2:
        raise ValueError(f"an anchor of {shallow} block cannot be stitched: at least 2 are needed")
    if not 1 <= kernel_size <= shallow or not 1 <= stride <= shallow:
        raise ValueError(
            f"kernel_size {kernel_size} and stride {stride} must lie in 1..{shallow} (blocks of the shallower anchor)"
        )
    if head_depth == tail_depth:
        return _windows(head_depth, kernel_size, stride)
    return _nearest_depth(head_depth, tail_depth, kernel_size, stride)


def _windows(depth: int, kernel_size: int, stride: int) -> list[Pairing]:
    """In each window every (a, b) gives `head[0:a+1] > tail[b:]`; the first window that names a pair owns it."""
    found: dict[tuple[int, int], Pairing] = {}
    for layer, first in enumerate(range(0, depth - kernel_size + 1, stride)):
        window = range(first, first + kernel_size)
        for a in window:
            for b in window:
                found.setdefault((a, b), Pairing(a + 1, b, layer))
    return list(found.values())


def _nearest_depth(head_depth: int, tail_depth: int, kernel_size: int, stride: int) -> list[Pairing]:
    """`head[0:floor(m*H/T)+1] > tail[m+1:]` for m = 0 .. T-2; one stitching layer for each head block left."""
    positions = range(tail_depth - 1)
    found: dict[tuple[int, int], Pairing] = {}
    for first in range(0, len(positions) - kernel_size + 1, stride):
        window = positions[first : first + kernel_size]
        for m in window:
            a = m * head_depth // tail_depth
            for n in window:
                found.setdefault((a, n + 1), Pairing(a + 1, n + 1, a))
    return list(found.values())
