"""What a shrunk anchor's `config.json` says of the model it was cut from: `shrunk_from`."""

from collections.abc import Mapping, Sequence
from typing import Any

from .spec import AnchorSpec

SHARED = ["embedding", "head"]  # what a shrunk anchor may have in common with the model it was cut from


def block_groups(depth: int, small_depth: int) -> list[range]:
    """`depth` blocks split into `small_depth` runs of neighbours, the shorter runs at both ends.

    The first and the last blocks of a model matter most, so they stay single where they can.

    Raises:
        ValueError: `small_depth` is not in 2..depth.
    """
    if not 2 <= small_depth <= depth:
        raise ValueError(f"depth {small_depth} is not in 2..{depth}, the blocks of the model that is cut")
    size, longer = divmod(depth, small_depth)
    shorter = small_depth - longer
    lengths = [size] * (-(-shorter // 2)) + [size + 1] * longer + [size] * (shorter // 2)
    starts = [sum(lengths[:index]) for index in range(small_depth)]
    return [range(start, start + length) for start, length in zip(starts, lengths)]


def shares_embedding(config: Mapping[str, Any]) -> bool:
    """Whether a shrunk anchor kept the embedding and head of the model it was cut from."""
    return "embedding" in (lineage_of(config) or {}).get("shared", ())


def parent_of(config: Mapping[str, Any], specs: Sequence[AnchorSpec]) -> int | None:
    """The anchor that a shrunk one was cut from, by depth and family; None where it is not among `specs`."""
    lineage = lineage_of(config)
    if lineage is None:
        return None
    found = [
        i for i, spec in enumerate(specs) if spec.depth == lineage["depth"] and spec.family == config["model_type"]
    ]
    return found[-1] if found else None


def aligned_junctions(configs: Sequence[Mapping[str, Any]], specs: Sequence[AnchorSpec]) -> list[list[int]]:
    """Junctions from each shrunk anchor into the model it was cut from: after each block, into the block that follows the one whose
    output it reproduces. At equal width those that would replace as many blocks as they bring are left out.

    Returns `[source anchor, source block, target anchor, target block]` each.

    Raises:
        ValueError: no anchor was cut from another of them.
    """
    found = []
    for index, config in enumerate(configs):
        parent = parent_of(config, specs)
        if parent is not None and parent != index:
            targets = lineage_of(config)["target_blocks"]
            narrower = specs[index].width < specs[parent].width
            found += [[index, a, parent, b + 1] for a, b in enumerate(targets[:-1]) if narrower or a < b]
    if not found:
        names = [f"{config.get('model_type')} of {spec.depth} blocks" for config, spec in zip(configs, specs)]
        cut = [
            f"anchor {i} from one of {lineage['depth']}" for i, c in enumerate(configs) if (lineage := lineage_of(c))
        ]
        raise ValueError(
            f"no anchor was cut from another: {', '.join(names)}" + (f" ({', '.join(cut)})" if cut else "")
            + "; make the small one with `stitched-llama shrink`, or leave junctions out"
        )  # fmt: skip
    return found


def replaced_blocks(configs: Sequence[Mapping[str, Any]], specs: Sequence[AnchorSpec]) -> list[range]:
    """Of two anchors, the second one's blocks that each block of the first, cut from it, stands for.

    Raises:
        ValueError: there are not two, or the first was not cut from the second at equal width.
    """
    lineage = lineage_of(configs[0]) if len(configs) == 2 else None
    if lineage is None or parent_of(configs[0], specs) != 1 or specs[0].width != specs[1].width:
        told = ", ".join(f"{spec.depth} blocks of {spec.width}" for spec in specs)
        raise ValueError(
            f"{told}: two anchors of equal width are needed, the first made from the second by `stitched-llama shrink`; else leave "
            "the choice of routes to a rule"
        )
    stops = [target + 1 for target in lineage["target_blocks"]]
    return [range(start, stop) for start, stop in zip([0, *stops], stops)]


def resolve_junctions(configs: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `StitchSpace` with `junctions="aligned"` replaced by the list, and an `adapter` of None by `"linear"`, or
    `"identity"` where aligned junctions join equal widths."""
    from .families import anchor_specs

    options = dict(options)
    adapter = options.get("adapter")
    if options.get("junctions") == "aligned":
        specs = anchor_specs(configs)
        options["junctions"] = aligned_junctions(configs, specs)
        if adapter is None and all(specs[a].leaves[b] == specs[c].enters[d] for a, b, c, d in options["junctions"]):
            adapter = "identity"
    return options | {"adapter": adapter or "linear"}


def lineage_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`shrunk_from` of a `config.json`, checked; None where it has none.

    Raises:
        ValueError: it is not what `save_shrunk` writes.
    """
    lineage = config.get("shrunk_from")
    if lineage is None:
        return None
    depth, targets = (
        (lineage.get(name) for name in ("depth", "target_blocks")) if isinstance(lineage, Mapping) else (0, 0)
    )
    whole = isinstance(depth, int) and isinstance(targets, list) and all(isinstance(t, int) for t in targets)
    if not whole or sorted(set(targets)) != targets or not targets or targets[0] < 0 or targets[-1] != depth - 1:
        raise ValueError(
            f"shrunk_from of the config is {repr(lineage)[:200]}: depth and ascending target_blocks up to depth - 1 are needed"
        )
    if len(targets) != config.get("num_hidden_layers"):
        raise ValueError(
            f"shrunk_from of the config names {len(targets)} target_blocks, the model has {config.get('num_hidden_layers')} blocks"
        )
    shared = lineage.get("shared", [])
    if not isinstance(shared, list) or not all(part in SHARED for part in shared):
        raise ValueError(f"shared in shrunk_from of the config is {repr(shared)[:200]}: a list of {SHARED} is needed")
    return lineage
