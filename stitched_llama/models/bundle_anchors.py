"""The anchors of a bundle by reference: where they lie, checked against what the bundle was made with."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from stitched_llama.bundles import CONFIG, DIGESTS, RECORDED
from stitched_llama.space import AnchorSpec, Stitch, anchor_spec, first_line, named

from .loading import check_options, load_anchor
from .references import (
    HUB_OPTIONS,
    anchor_config,
    check_digests,
    check_plain,
    digests_in_memory,
    reference_to,
)


def bundle_folder(name: str, hub: Mapping[str, Any]) -> Path:
    """The local folder of a bundle, fetched from the Hub where it is a repository.

    Raises:
        OSError: there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=[*RECORDED, DIGESTS], **hub))
    except Exception as error:
        raise OSError(
            f"{name!r} is neither a folder here nor a bundle on the Hub in reach: {first_line(error)}"
        ) from error


def _check_shape(source: str, index: int, stored: Any, spec: AnchorSpec) -> None:
    """Refuses another model in an anchor's place before its weights are read."""
    found = anchor_spec(stored.to_dict())
    if (found.family, found.width, found.depth) != (spec.family, spec.width, spec.depth):
        raise ValueError(
            f"anchor {index} is {source}, a {found.family} of {found.depth} blocks, {found.width} wide; the bundle was made with a "
            f"{spec.family} of {spec.depth} blocks, {spec.width} wide: name its anchors small to large"
        )
    if (found.blocks, found.embedding, found.tied) != (spec.blocks, spec.embedding, spec.tied):
        raise ValueError(
            f"anchor {index} is {source}, whose blocks or embedding have other sizes than the {spec.family} the bundle was made with "
            f"({found.params:,} parameters against {spec.params:,}): name its anchors small to large"
        )


def load_anchors(
    config: Any,
    folder: Path,
    given: Sequence[Any] | None,
    stitches: Sequence[Stitch],
    load: Mapping[str, Any],
    hub: Mapping[str, Any],
    whole: bool | None = None,
    trust_remote_code: bool = False,
) -> list[PreTrainedModel]:
    """The anchors of a bundle, each checked against the weights it was trained on.

    Args:
        config: the bundle's configuration.
        folder: of the bundle; a relative path of an anchor may also start there.
        given: folders, Hub ids or models to use instead of those the bundle names.
        stitches: only what these need is loaded.
        load, hub: options of each anchor's `from_pretrained`.
        whole: whether all bytes of an anchor are compared; None where it has less than a GiB, else samples are.
        trust_remote_code: run the code that an anchor's folder or repository brings.

    Raises:
        ValueError: an anchor changed, or the bundle does not know where one lies.
        OSError: an anchor cannot be loaded.
    """
    hub = {name: value for name, value in hub.items() if name != "revision"}  # the bundle's is not the anchors'
    if not config.anchors:
        raise ValueError(
            "anchors are given, and the bundle names no anchors: the weights of its own are in it, leave anchors out"
        )
    if given is not None and len(given) != len(config.anchors):
        raise ValueError(
            f"{len(given)} anchors given, the bundle has {len(config.anchors)}: give one for each, small to large"
        )
    check_options(given or (), load)
    loaded = []
    for index, reference in enumerate(config.anchors):
        source = given[index] if given is not None else reference["name_or_path"]
        if source is None:
            raise ValueError(
                f"the bundle does not know where anchor {index} lies: pass anchors=[...] to from_pretrained"
            )
        if isinstance(source, PreTrainedModel):
            check_plain(source, index)
            found = reference_to(source)  # by its files where it still equals them
            if found["fingerprint"] != reference["fingerprint"]:
                found = digests_in_memory(source)
            digests = {kind: found[kind] for kind in ("fingerprint", "digests")}
            check_digests(f"the given model {index}", index, reference, digests)
            loaded.append(source)
            continue
        source = os.fspath(source)
        if not Path(source).is_dir() and (folder / source).is_dir():
            source = str(folder / source)
        revision = reference["revision"] if given is None else None
        options = {**load, **hub} | ({"revision": revision} if revision else {})
        with named(f"anchor {index} of {folder / CONFIG}"):
            spec, own = anchor_spec(config.anchor_configs[index]), config.anchor_config(index)
        try:
            of_hub = {name: options[name] for name in HUB_OPTIONS if name in options}
            stored = anchor_config(source, trust_remote_code, attention=True, **of_hub)  # not what it then runs with
            _check_shape(source, index, stored, spec)
            if "digests" not in reference and not hasattr(own, "quantization_config"):
                if hasattr(stored, "quantization_config"):  # an old bundle did not say so
                    own.quantization_config = stored.quantization_config
            new_head = getattr(config, "train_head", False)  # the bundle holds it
            how = {"new_head": new_head, "whole": whole, "trust_remote_code": trust_remote_code, **options}
            with named(f"anchor {index} of the bundle, {source!r}"):
                anchor, found = load_anchor(source, own, spec, index, stitches, **how)
        except OSError as error:
            raise OSError(
                f"anchor {index} of the bundle, {source!r}, cannot be loaded: {first_line(error)}; where it lies elsewhere now, pass "
                "anchors=[...] to from_pretrained"
            ) from error
        check_digests(source, index, reference, found)
        loaded.append(anchor)
    return loaded
