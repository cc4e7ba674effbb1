"""The space: all stitches of two or more anchors, in order."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from operator import index
from typing import Any

from .adapters import StitchingLayerSpec, check_adapter, strides_reach
from .configs import fields_of
from .cost import Precision, route_cost
from .families import anchor_specs
from .given import MOST_STITCHES, check_junctions, check_routes, resolve_junctions
from .rules import Pairing, pairings
from .spec import AnchorSpec
from .stitch import Junction, Segment, Stitch, route_key

DIRECTIONS = ("fast-to-slow", "slow-to-fast", "both")
PAIRS = ("nearest", "any", "chain")
SPACE_OPTIONS = (
    "kernel_size", "stride", "direction", "pairs", "adapter", "rescale", "adapter_norm", "across_stages", "junctions",
    "routes",
)  # fmt: skip
_Route = tuple[tuple[Segment, ...], tuple[Junction, ...]]
_PADDING = (
    0.01  # tolerated share of a vocabulary's size: Qwen2.5 has 151,936 rows in small models and 152,064 in large ones
)
_REMEDIES = {
    "vocab_size": "stitches need one tokenizer",
    "image_size": "choose equal ones, or give image_size where they run at any",
    "num_labels": "give num_labels, and each anchor gets a new head",
}


class StitchSpace:
    """Every stitch of two or more anchors, iterable by `stitch_id` (ascending in parameters).

    Args:
        anchors: specs in ascending order of parameters.
        kernel_size, stride: the sliding window of SN-Net; ESTA takes 1 and 1 for LLaMA, 2 and 1 for ViT.
        direction: `"fast-to-slow"` (small source, large target; default), `"slow-to-fast"` or `"both"`.
        pairs: `"nearest"` neighbours in size (default), `"any"` pair, or `"chain"`: any pair and routes over three.
        adapter, rescale, adapter_norm: kind of the stitching layers of image anchors (see `StitchingLayerSpec`).
        across_stages: also join stages of different resolution; without `rescale` the target runs at the source's.
        junctions: explicit junctions instead of a rule: each `(source block, target block)` from the first anchor to the second, or
            `(source anchor, source block, target anchor, target block)`. A route goes from the output of the source
            block to the input of the target block.
            For text and a `kernel_size` of 1, routes with more parameters than the largest anchor are omitted.
        routes: explicit stitches instead of a rule: keys such as `1[0:5]>0[3:5]>1[9:30]`, of two or more segments each.
        precision: dtype and quantisation in which bytes are counted.

    Raises:
        ValueError: fewer than two anchors, anchors not in ascending order, vocabularies that differ, a bad option, a junction that is
            impossible, or a route given by its key that is larger than the largest anchor, of text.

    Source: SN-Net section 3.3, ESTA sections 5.1 and 5.2, Traft and Cheney section 2.
    """

    def __init__(
        self,
        anchors: Sequence[AnchorSpec],
        kernel_size: int = 1,
        stride: int = 1,
        direction: str = "fast-to-slow",
        pairs: str = "nearest",
        adapter: str = "linear",
        rescale: str = "none",
        adapter_norm: str = "none",
        across_stages: bool = False,
        junctions: Sequence[Sequence[int]] | None = None,
        routes: Sequence[str] | None = None,
        precision: Precision = Precision(),
    ):
        _check_anchors(anchors)
        check_adapter(adapter, rescale, adapter_norm)
        if direction not in DIRECTIONS:
            raise ValueError(f"direction {direction!r} is unknown; one of {', '.join(DIRECTIONS)} is needed")
        if pairs not in PAIRS:
            raise ValueError(f"pairs {pairs!r} is unknown; one of {', '.join(PAIRS)} is needed")
        self.anchors = tuple(anchors)
        self.options: dict[str, Any] = {
            "kernel_size": kernel_size,
            "stride": stride,
            "direction": direction,
            "pairs": pairs,
        }
        chosen = {"adapter": adapter, "rescale": rescale, "adapter_norm": adapter_norm, "across_stages": across_stages}
        self.options |= {name: value for name, value in chosen.items() if value not in ("linear", "none", False)}
        if self.anchors[0].unit == "token" and (
            images := [name for name in list(self.options)[4:] if (name, adapter) != ("adapter", "identity")]
        ):
            raise ValueError(f"{', '.join(images)} is for images: {self.anchors[0].family} reads tokens")
        if junctions is not None or routes is not None:
            if (kernel_size, stride, pairs, across_stages) != (1, 1, "nearest", False) or direction != "fast-to-slow":
                raise ValueError(
                    "junctions or routes are given one by one: leave kernel_size, stride, direction, pairs and across_stages out"
                )
            if junctions is not None and routes is not None:
                raise ValueError("junctions and routes both given: pass one of them")
        if junctions is not None:
            self.options["junctions"] = check_junctions(junctions, self.anchors)
        given = None if routes is None else check_routes(routes, self.anchors)
        if given is not None:
            self.options["routes"] = [route_key(segments) for segments in given]
        if across_stages and rescale == "none" and pairs == "chain":
            raise ValueError("routes over three anchors cross stages only with rescale 'bilinear' or 'strided'")
        self.precision = precision
        self.stitching_layers: dict[str, StitchingLayerSpec] = {}
        found: list[_Route] = [((Segment(i, 0, spec.depth),), ()) for i, spec in enumerate(self.anchors)]
        if given is not None:
            found += [(segments, self._junctions_of(segments)) for segments in given]
        else:
            found += self._routes_over_two() + (self._routes_over_three() if pairs == "chain" else [])
        self._stitches = self._number(found)
        self._by_key = {stitch.key: stitch for stitch in self._stitches}

    @classmethod
    def from_configs(cls, configs: Sequence[Any], image_size: Any = None, **options: Any) -> "StitchSpace":
        """A space from configurations: each a folder, a Hub id, a configuration of Transformers, or a mapping of its fields. No weights
        are read. `junctions="aligned"` takes the junctions from the configuration of a shrunk anchor.

        Args:
            image_size: for image anchors that run at any; by default their own.
        """
        fields = [fields_of(config) for config in configs]
        return cls(anchor_specs(fields, image_size), **resolve_junctions(fields, options))

    def _ordered_pairs(self) -> list[tuple[int, int]]:
        """(source, target) anchors that may be joined."""
        count = len(self.anchors)
        if "junctions" in self.options:
            return list(dict.fromkeys((source, target) for source, _, target, _ in self.options["junctions"]))
        near = self.options["pairs"] == "nearest"
        ascending = [(i, j) for i, j in combinations(range(count), 2) if j == i + 1 or not near]
        descending = [(j, i) for i, j in ascending]
        return {"fast-to-slow": ascending, "slow-to-fast": descending, "both": ascending + descending}[
            self.options["direction"]
        ]

    def _pairings(self, source: int, target: int) -> list[Pairing]:
        if "junctions" in self.options:
            return [
                Pairing(a + 1, b, f"{a}to{b}")
                for left, a, entered, b in self.options["junctions"]
                if (left, entered) == (source, target)
            ]
        return pairings(
            self.anchors[source].leaves,
            self.anchors[target].enters,
            self.options["kernel_size"],
            self.options["stride"],
            rescaled="rescale" in self.options,
            across_stages="across_stages" in self.options,
        )

    def _junction(self, source: int, target: int, pairing: Pairing) -> Junction:
        stop, start = pairing.source_stop, pairing.target_start
        before, after = self.anchors[source].leaves[stop - 1], self.anchors[target].enters[start]
        if self.options.get("adapter") == "identity":
            if before != after:
                raise ValueError(
                    f"adapter 'identity' joins equal features; block {stop - 1} of anchor {source} gives {before}, block "
                    f"{start} of anchor {target} takes {after}: use adapter 'linear'"
                )
            return Junction(None, source, stop, target, start)
        layer = StitchingLayerSpec(
            f"{source}_{target}_{pairing.layer}",
            before.width,
            after.width,
            self.options.get("adapter", "linear"),
            self.options.get("rescale", "none"),
            self.options.get("adapter_norm", "none"),
            before.grid,
            after.grid,
            min(before.special_tokens, after.special_tokens),  # further ones of the target are not mapped
        )
        if layer.rescale == "strided" and not strides_reach(before.grid, after.grid):
            raise ValueError(
                f"no map of one stride joins block {stop - 1} of anchor {source}, which leaves {before}, to "
                f"block {start} of anchor {target}, entered at {after}: rescale='bilinear' joins any two"
            )
        if self.stitching_layers.setdefault(layer.name, layer) != layer:  # a window over blocks of other widths
            layer = replace(layer, name=f"{layer.name}_{before.width}x{after.width}")
            self.stitching_layers[layer.name] = layer
        return Junction(layer.name, source, stop, target, start)

    def _junctions_of(self, segments: Sequence[Segment]) -> tuple[Junction, ...]:
        """The junctions of an explicit route, each with a separate stitching layer."""
        return tuple(
            self._junction(a.anchor, b.anchor, Pairing(a.stop, b.start, f"{a.stop - 1}to{b.start}"))
            for a, b in zip(segments, segments[1:])
        )

    def _routes_over_two(self) -> list[_Route]:
        routes: list[_Route] = []
        for source, target in self._ordered_pairs():
            for p in self._pairings(source, target):
                last = Segment(target, p.target_start, self.anchors[target].depth)
                _add(routes, (Segment(source, 0, p.source_stop), last), (self._junction(source, target, p),))
        return routes

    def _routes_over_three(self) -> list[_Route]:
        routes: list[_Route] = []
        pairs = self._ordered_pairs()
        chains = [(a, b, c) for a, b in pairs for b_, c in pairs if b == b_ and c != a]
        for a, b, c in chains:
            for p in self._pairings(a, b):
                for q in self._pairings(b, c):
                    if q.source_stop <= p.target_start:
                        continue  # no block of the middle anchor is left
                    segments = (
                        Segment(a, 0, p.source_stop),
                        Segment(b, p.target_start, q.source_stop),
                        Segment(c, q.target_start, self.anchors[c].depth),
                    )
                    _add(routes, segments, (self._junction(a, b, p), self._junction(b, c, q)))
        return routes

    def _number(self, routes: list[_Route]) -> tuple[Stitch, ...]:
        stitches = []
        largest = max(anchor.params for anchor in self.anchors)
        # for a wider kernel SN-Net's windows are kept as published
        limited = self.anchors[0].unit == "token" and self.options["kernel_size"] == 1
        for segments, junctions in routes:
            layers = [self.stitching_layers.get(junction.layer or "") for junction in junctions]
            cost = route_cost(self.anchors, segments, layers, self.precision)
            if len(segments) > 1 and limited and cost.params > largest:
                if "routes" in self.options:
                    raise ValueError(
                        f"route {route_key(segments)} has {cost.params:,} parameters, more than the largest anchor, which has "
                        f"{largest:,}: leave it out"
                    )
                continue  # the largest anchor is smaller
            stitches.append(
                Stitch(-1, route_key(segments), segments, junctions, **asdict(cost), unit=self.anchors[0].unit)
            )
        stitches.sort(key=lambda stitch: (stitch.params, stitch.key))
        return tuple(replace(stitch, stitch_id=i) for i, stitch in enumerate(stitches))

    def __len__(self) -> int:
        return len(self._stitches)

    def __iter__(self) -> Iterator[Stitch]:
        return iter(self._stitches)

    def __getitem__(self, stitch_id: int | str) -> Stitch:
        """A stitch by id or key.

        Raises:
            ValueError: no such stitch.
        """
        if isinstance(stitch_id, str) and stitch_id in self._by_key:
            return self._by_key[stitch_id]
        if isinstance(stitch_id, str) and stitch_id.isdecimal():
            stitch_id = int(stitch_id)
        if hasattr(stitch_id, "__index__") and not isinstance(stitch_id, bool) and 0 <= index(stitch_id) < len(self):
            return self._stitches[index(stitch_id)]
        raise ValueError(
            f"stitch {stitch_id!r} is not in this space; ids are 0..{len(self) - 1} and keys look like "
            f"{self._stitches[len(self) // 2].key!r} (list them with `stitched-llama space`)"
        )

    def __contains__(self, stitch_id: object) -> bool:
        try:
            self[stitch_id]  # type: ignore[index]
        except ValueError:
            return False
        return True

    def anchor_stitch(self, anchor: int) -> Stitch:
        """The stitch that is anchor number `anchor` (negative counts from the end) alone."""
        index = range(len(self.anchors))[anchor]
        return self._by_key[str(Segment(index, 0, self.anchors[index].depth))]

    @property
    def junctions(self) -> list[Junction]:
        """All distinct junctions, ordered by source and target anchor and block."""
        found = {junction for stitch in self for junction in stitch.junctions}
        return sorted(found, key=lambda j: (j.head, j.tail, j.head_stop, j.tail_start))

    def with_precision(self, precision: Precision) -> "StitchSpace":
        """The same space with bytes and MACs counted for another precision."""
        return StitchSpace(self.anchors, **self.options, precision=precision)

    @property
    def digest(self) -> str:
        """SHA-256 of the anchors' shapes, the options and the keys in order, on which the meaning of a `stitch_id` depends."""
        content = {
            "anchors": [[a.family, a.width, a.depth, *a.contract.values(), a.params] for a in self.anchors],
            "options": self.options,
            "keys": [stitch.key for stitch in self],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _add(routes: list[_Route], segments: tuple[Segment, ...], junctions: tuple[Junction, ...]) -> None:
    if len(routes) >= MOST_STITCHES:
        raise ValueError(
            f"these anchors have more than {MOST_STITCHES:,} stitches: a smaller kernel_size, a larger stride or pairs='nearest' "
            "gives fewer"
        )
    routes.append((segments, junctions))


def _agree(name: str, one: Any, other: Any) -> bool:
    """Whether two values of a contract field are equal, or vocabulary sizes that differ by padding."""
    return one == other or (name == "vocab_size" and abs(one - other) < _PADDING * min(one, other))


def _check_anchors(anchors: Sequence[AnchorSpec]) -> None:
    if len(anchors) < 2:
        raise ValueError(f"{len(anchors)} anchor given; a space needs at least two")
    for i, (small, large) in enumerate(zip(anchors, anchors[1:])):
        if small.params > large.params:
            raise ValueError(
                f"anchors in the wrong order: anchor {i} has {small.params:,} parameters and anchor {i + 1} has "
                f"{large.params:,}; name them from small to large"
            )
        for name, value in small.contract.items():
            if name in large.contract and not _agree(name, value, large.contract[name]):
                raise ValueError(
                    f"anchors do not belong together: {name} is {value} in anchor {i} ({small.family}) and "
                    f"{large.contract[name]} in anchor {i + 1} ({large.family}); {_REMEDIES.get(name, 'choose equal ones')}"
                )
        if small.unit != large.unit:
            raise ValueError(
                f"anchors do not belong together: {small.family} reads {small.unit}s, {large.family} {large.unit}s: stitch text "
                "models with text models, image models with image models"
            )
