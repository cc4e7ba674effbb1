"""Explicit junctions and routes, given instead of a rule."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .families import anchor_specs
from .lineage import aligned_junctions
from .spec import AnchorSpec
from .stitch import Segment, route_key

MOST_STITCHES = 10_000


def check_junctions(junctions: Sequence[Sequence[int]], anchors: Sequence[AnchorSpec]) -> list[list[int]]:
    """Explicit junctions as `[source anchor, source block, target anchor, target block]`, in ascending order.

    Raises:
        ValueError: one is not a pair or quadruple of whole numbers, lies outside the anchors, joins an anchor with itself, or is given twice;
            names it. There are more than 10,000.
    """
    _check_count("junctions", junctions)
    found: dict[tuple[int, ...], list[int]] = {}
    for given in junctions:
        numbers: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
        full = [0, numbers[0], 1, numbers[1]] if len(numbers) == 2 else numbers
        if len(full) != 4 or not all(isinstance(number, int) and not isinstance(number, bool) for number in full):
            raise ValueError(
                f"junction {repr(given)[:200]} cannot be read: (source block, target block), or (source anchor, source block, target anchor, "
                "target block), is needed"
            )
        source, left, target, entered = full
        for index, block in ((source, left), (target, entered)):
            if not 0 <= index < len(anchors) or not 0 <= block < anchors[index].depth:
                depths = ", ".join(f"anchor {i} has {anchor.depth} blocks" for i, anchor in enumerate(anchors))
                raise ValueError(f"junction {given!r} names block {block} of anchor {index}: {depths}, numbered from 0")
        if source == target:
            raise ValueError(f"junction {given!r} joins anchor {source} with itself: name two anchors")
        if tuple(full) in found:
            raise ValueError(f"junction {given!r} is given twice")
        found[tuple(full)] = full
    if not found:
        raise ValueError("junctions is an empty list: give one or more, or leave it out for a rule")
    return sorted(found.values())


def parse_junctions(values: str | Sequence[str] | None) -> list[list[int]] | str | None:
    """The `junctions` of a space from a command line: `nearest` (None, the rule), `aligned`, or pairs such as `3:8`, also
    `1:3:0:8` with the anchors.

    Raises:
        ValueError: a value that is none of these.
    """
    values = [values] if isinstance(values, str) else list(values or ["nearest"])
    if values in (["nearest"], ["aligned"]):
        return None if values == ["nearest"] else "aligned"
    found = []
    for value in values:
        numbers = value.split(":")
        if len(numbers) not in (2, 4) or not all(number.isdecimal() for number in numbers):
            raise ValueError(
                f"junctions {value!r} cannot be read: 'nearest', 'aligned', or pairs of blocks such as 3:8, is needed"
            )
        found.append([int(number) for number in numbers])
    return found


def resolve_junctions(configs: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `StitchSpace` with `junctions="aligned"` replaced by the list, and an `adapter` of None by `"linear"`, or
    `"identity"` where aligned junctions join equal widths."""
    options = dict(options)
    adapter = options.get("adapter")
    if options.get("junctions") == "aligned":
        specs = anchor_specs(configs)
        options["junctions"] = aligned_junctions(configs, specs)
        if adapter is None and all(specs[a].leaves[b] == specs[c].enters[d] for a, b, c, d in options["junctions"]):
            adapter = "identity"
    return options | {"adapter": adapter or "linear"}


_SEGMENT = re.compile(r"(\d{1,6})\[(\d{1,6}):(\d{1,6})\]", re.ASCII)


def check_routes(routes: Sequence[str], anchors: Sequence[AnchorSpec]) -> list[tuple[Segment, ...]]:
    """Explicit routes by key, such as `1[0:5]>0[3:5]>1[9:30]`, in order of their keys.

    Raises:
        ValueError: a key cannot be read, names blocks outside the anchors, does not begin with the first block of an anchor and end
            with the last one of an anchor, runs a block twice, or is given twice; names it. There are more than 10,000.
    """
    _check_count("routes", routes)
    found = {}
    for key in routes:
        matches = [_SEGMENT.fullmatch(part) for part in key.split(">")] if isinstance(key, str) else [None]
        segments = tuple(Segment(*map(int, match.groups())) for match in matches if match)
        if None in matches or len(matches) < 2:
            raise ValueError(
                f"route {repr(key)[:200]} cannot be read: two or more segments such as 0[0:8]>1[15:30] are needed"
            )
        key = route_key(segments)  # numbers may have been written with leading zeros
        for segment in segments:
            if segment.anchor >= len(anchors) or not segment.start < segment.stop <= anchors[segment.anchor].depth:
                depths = ", ".join(f"anchor {i} has {anchor.depth} blocks" for i, anchor in enumerate(anchors))
                raise ValueError(f"route {key!r} names {segment}, which is not there: {depths}")
        if segments[0].start or segments[-1].stop != anchors[segments[-1].anchor].depth:
            raise ValueError(
                f"route {key!r} must begin with the first block of an anchor and end with the last one of an anchor"
            )
        if any(a.anchor == b.anchor for a, b in zip(segments, segments[1:])):
            raise ValueError(f"route {key!r} joins an anchor with itself: a junction leads to another anchor")
        blocks = [(s.anchor, block) for s in segments for block in range(s.start, s.stop)]
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"route {key!r} runs a block twice")
        if key in found:
            raise ValueError(f"route {key!r} is given twice")
        found[key] = segments
    if not found:
        raise ValueError("routes is an empty list: give one or more, or leave it out for a rule")
    return [found[key] for key in sorted(found)]


def _check_count(name: str, given: Sequence[object]) -> None:
    """Refuses more of them than a space may have stitches.

    Raises:
        ValueError: names the count.
    """
    if len(given) > MOST_STITCHES:
        raise ValueError(f"{name} has {len(given):,} entries: a space has at most {MOST_STITCHES:,} stitches")
