"""`shrunk_from` in the `config.json` of a shrunk anchor: the model it was cut from."""

from collections.abc import Mapping, Sequence
from typing import Any

from .spec import AnchorSpec

SHARED = ["embedding", "head"]  # what a shrunk anchor may have in common with the model it was cut from


def block_groups(depth: int, small_depth: int) -> list[range]:
    """`depth` blocks split into `small_depth` groups of neighbours, the shorter groups at both ends.

    The first and the last blocks of a model matter most, so they are kept as groups of one where possible.

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
    """Whether a shrunk anchor shares embedding and head with the model it was cut from."""
    return "embedding" in (lineage_of(config) or {}).get("shared", ())


def parent_of(config: Mapping[str, Any], specs: Sequence[AnchorSpec]) -> int | None:
    """The anchor that a shrunk one was cut from, by depth and family; None if it is not among `specs`."""
    lineage = lineage_of(config)
    if lineage is None:
        return None
    found = [
        i for i, spec in enumerate(specs) if spec.depth == lineage["depth"] and spec.family == config["model_type"]
    ]
    return found[-1] if found else None


def aligned_junctions(configs: Sequence[Mapping[str, Any]], specs: Sequence[AnchorSpec]) -> list[list[int]]:
    """Junctions from each shrunk anchor to the model it was cut from: from each block to the block that follows the one whose output it
    reproduces. At equal width junctions that leave the number of blocks unchanged are omitted.

    Returns `[source anchor, source block, target anchor, target block]` each.

    Raises:
        ValueError: no anchor was cut from another of them.
    """
    found = []
    for index, config in enumerate(configs):
        lineage, parent = lineage_of(config), parent_of(config, specs)
        if lineage is not None and parent is not None and parent != index:
            targets = lineage["target_blocks"]
            narrower = specs[index].width < specs[parent].width
            found += [[index, a, parent, b + 1] for a, b in enumerate(targets[:-1]) if narrower or a < b]
    if not found:
        names = [f"{config.get('model_type')} of {spec.depth} blocks" for config, spec in zip(configs, specs)]
        cut = [f"anchor {i} from one of {origin['depth']}" for i, c in enumerate(configs) if (origin := lineage_of(c))]
        raise ValueError(
            f"no anchor was cut from another: {', '.join(names)}" + (f" ({', '.join(cut)})" if cut else "")
            + "; make the small one with `stitched-llama shrink`, or leave junctions out"
        )  # fmt: skip
    return found


def replaced_blocks(configs: Sequence[Mapping[str, Any]], specs: Sequence[AnchorSpec]) -> list[range]:
    """For each block of the first of two anchors, the blocks of the second that it was trained to replace.

    Raises:
        ValueError: there are not two, or the first was not cut from the second at equal width.
    """
    lineage = lineage_of(configs[0]) if len(configs) == 2 else None
    if lineage is None or parent_of(configs[0], specs) != 1 or specs[0].width != specs[1].width:
        shapes = ", ".join(f"{spec.depth} blocks of {spec.width}" for spec in specs)
        raise ValueError(
            f"{shapes}: two anchors of equal width are needed, the first made from the second by `stitched-llama shrink`; else leave "
            "the choice of routes to a rule"
        )
    stops = [target + 1 for target in lineage["target_blocks"]]
    return [range(start, stop) for start, stop in zip([0, *stops], stops)]


def lineage_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`shrunk_from` of a `config.json`, checked; None where it has none.

    Raises:
        ValueError: it is not what `save_shrunk` writes.
    """
    lineage = config.get("shrunk_from")
    if lineage is None:
        return None
    fields: Mapping[str, Any] = lineage if isinstance(lineage, Mapping) else {}
    depth: Any = fields.get("depth")
    targets: Any = fields.get("target_blocks")
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
    return fields
