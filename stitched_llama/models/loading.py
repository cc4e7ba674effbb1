"""Anchors by reference: checked from their configs alone, loaded whole or only the blocks a route needs."""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from stitched_llama.anchors import FAMILIES, Family, LlamaFamily
from stitched_llama.bundles import (
    CONFIG,
    GENERATION,
    TABLE,
    WEIGHTS,
    fingerprint_files,
    fingerprint_tensors,
    part_of,
    read_header,
)
from stitched_llama.space import AnchorSpec, Stitch, anchor_spec

_INDEX = "model.safetensors.index.json"
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def check_tokenizers(names: Sequence[Any], **hub: Any) -> None:
    """Refuses anchors whose tokenizers differ; warns where an anchor has none to compare. Loaded models have none.

    Raises:
        ValueError: two anchors give different ids to the same piece, or read the same text as different pieces.
    """
    tokenizers = []
    for name in names:
        if not isinstance(name, str):
            continue
        try:
            tokenizers.append((name, AutoTokenizer.from_pretrained(name, **hub)))
        except (OSError, ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logging.getLogger(__name__).warning(
                "%s has no tokenizer that could be compared with the other anchors' (%s): make sure they are one",
                name,
                reason,
            )
    for (name, ours), (other, theirs) in zip(tokenizers, tokenizers[1:]):
        _check_pieces(name, ours.get_vocab(), other, theirs.get_vocab())
        for special in ("bos_token_id", "eos_token_id"):
            if getattr(ours, special) != getattr(theirs, special):
                raise ValueError(
                    f"anchors do not belong together: {special} is {getattr(ours, special)} in {name} and "
                    f"{getattr(theirs, special)} in {other}; stitches need one tokenizer"
                )
        if ours(_PROBE).input_ids != theirs(_PROBE).input_ids:
            raise ValueError(
                f"anchors do not belong together: {name} and {other} read {_PROBE!r} as different ids though their pieces "
                "are the same (prefix space or normalisation); stitches need one tokenizer"
            )


_PROBE = "hi  Ünïcode 你好 🦙\n\tdef f(x): return 1234567"


def _check_pieces(name: str, vocabulary: dict[str, int], other: str, theirs: dict[str, int]) -> None:
    if vocabulary != theirs:
        piece = min(p for p in vocabulary.keys() | theirs.keys() if vocabulary.get(p) != theirs.get(p))
        raise ValueError(
            f"anchors do not belong together: piece {piece!r} has id {vocabulary.get(piece)} in {name} and "
            f"{theirs.get(piece)} in {other}; stitches need one tokenizer"
        )


def weight_files(name_or_path: str, needed: "_Needed | None" = None, **hub: Any) -> dict[str, Path]:
    """Tensor name -> safetensors file that holds it, of a folder or Hub repository; fetches only files that are needed.

    Raises:
        ValueError: there are no safetensors weights.
    """
    hub = {name: value for name, value in hub.items() if name in _HUB_OPTIONS and value is not None}
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": True}
    index = cached_file(name_or_path, _INDEX, **quiet, **hub)
    if index is not None:
        shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        wanted = {tensor: shard for tensor, shard in shards.items() if needed is None or needed(tensor)}
        files = {shard: Path(cached_file(name_or_path, shard, **hub)) for shard in sorted(set(wanted.values()))}
        return {tensor: files[shard] for tensor, shard in wanted.items()}
    weights = cached_file(name_or_path, WEIGHTS, **quiet, **hub)
    if weights is None:
        raise ValueError(f"{name_or_path} has no {WEIGHTS}: only safetensors weights are read; convert it first")
    header, _ = read_header(Path(weights))
    return {tensor: Path(weights) for tensor in header if needed is None or needed(tensor)}


class _Needed:
    """Which tensors of an anchor a set of routes needs."""

    def __init__(self, family: LlamaFamily, spec: AnchorSpec, index: int, stitches: Iterable[Stitch]):
        routes = [stitch.segments for stitch in stitches]
        self.family = family
        self.blocks = {b for route in routes for s in route if s.anchor == index for b in range(s.start, s.stop)}
        self.head = any(route[-1].anchor == index for route in routes)
        self.embedding = any(route[0].anchor == index for route in routes) or (self.head and spec.tied)
        self.all = len(self.blocks) == spec.depth and self.head and self.embedding

    def __call__(self, tensor: str) -> bool:
        family = self.family
        if tensor.startswith(family.blocks_module + "."):
            return int(tensor.removeprefix(family.blocks_module + ".").split(".")[0]) in self.blocks
        if tensor.startswith(family.embedding_modules):
            return self.embedding
        return self.head if tensor.startswith(family.head_modules) else True


def load_anchor(
    name_or_path: str, config: Any, spec: AnchorSpec, index: int, stitches: Iterable[Stitch] | None, **options: Any
) -> tuple[PreTrainedModel, dict[str, str]]:
    """An anchor, frozen, with the digests of its parts; only the blocks, embedding and head that `stitches` need.

    Raises:
        ValueError: there are no safetensors weights, or a tensor is missing.
    """
    family = FAMILIES[spec.family]
    if not isinstance(family, LlamaFamily):
        return _load_image_anchor(name_or_path, config, family, index, stitches, **options)
    needed = None if stitches is None else _Needed(family, spec, index, stitches)
    if needed is not None and needed.all:
        needed = None
    files = weight_files(name_or_path, needed, **options)
    fingerprint = fingerprint_files(sorted(set(files.values())))
    if needed is None:
        model, info = family.auto_class().from_pretrained(
            name_or_path, use_safetensors=True, output_loading_info=True, **options
        )
    else:
        fingerprint = {part: digest for part, digest in fingerprint.items() if part in {part_of(t) for t in files}}
        options = {name: value for name, value in options.items() if name not in _HUB_OPTIONS}
        if not files:  # not on any of these routes: no weight is left that could be quantised
            options.pop("quantization_config", None)
        model_class = _partial_class(family.auto_class()._model_mapping[type(config)], needed)
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=_read(files), output_loading_info=True, **options
        )
    _check_whole(name_or_path, info["missing_keys"])
    model.requires_grad_(False)
    return model.eval(), fingerprint


def _check_whole(name_or_path: str, missing: Iterable[str]) -> None:
    if missing := sorted(missing):
        raise ValueError(
            f"{name_or_path} lacks {len(missing)} tensors, the first is {missing[0]}: "
            "the checkpoint is incomplete, download it again"
        )


def _load_image_anchor(
    name_or_path: str, config: Any, family: Family, index: int, stitches: Iterable[Stitch] | None, **options: Any
) -> tuple[PreTrainedModel, dict[str, str]]:
    """An image anchor, read whole (older checkpoints name their tensors otherwise); blocks off every route are let go.

    Its head is born anew where `config` has another number of classes than the checkpoint.
    """
    fingerprint = fingerprint_files(sorted(set(weight_files(name_or_path, **options).values())))
    model, info = family.auto_class().from_pretrained(
        name_or_path,
        config=config,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    renewed = {name for name, *_ in info["mismatched_keys"]}
    _check_whole(name_or_path, set(info["missing_keys"]) - renewed)
    if wrong := sorted(name for name in renewed if not name.startswith(family.head_modules)):
        raise ValueError(
            f"{name_or_path} and its config differ in the shape of {wrong[0]}: they do not belong together"
        )
    if stitches is not None:
        used = {block for stitch in stitches for anchor, block in stitch.blocks() if anchor == index}
        for number, name in enumerate(family.block_names(model)):
            if number not in used:
                model.set_submodule(name, nn.Identity())
    model.requires_grad_(False)
    return model.eval(), fingerprint


def _partial_class(model_class: type[PreTrainedModel], needed: _Needed) -> type[PreTrainedModel]:
    """The same model with everything that is not needed left empty, original block numbers kept."""

    def __init__(self, config):
        model_class.__init__(self, config)
        blocks = self.get_submodule(needed.family.blocks_module)
        for number in range(len(blocks)):
            if number not in needed.blocks:
                blocks[number] = nn.Identity()
        unused = () if needed.embedding else needed.family.embedding_modules
        unused += () if needed.head else needed.family.head_modules
        for name in unused:
            self.set_submodule(name, nn.Identity())
        if not (needed.head and needed.embedding):
            self.all_tied_weights_keys = {}

    return type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})


def _read(files: Mapping[str, Path]) -> dict[str, Any]:
    tensors = {}
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name, home in files.items() if home == path}
    return tensors


def fingerprint_in_memory(model: PreTrainedModel) -> dict[str, str]:
    """Digests of the parts of an anchor that was handed over as an object."""
    tied = set(model.all_tied_weights_keys)
    return fingerprint_tensors({name: t for name, t in model.named_parameters() if name not in tied})


def reference_to(model: PreTrainedModel) -> dict[str, Any]:
    """How a bundle names an anchor that was handed over as an object: by the files it came from if it still equals
    them (in its own dtype), else by its weights in memory alone."""
    name = model.name_or_path
    try:
        files = weight_files(name) if name else {}
    except (ValueError, OSError):
        files = {}
    own = dict(model.named_parameters())
    for path in set(files.values()):
        with safe_open(path, framework="pt") as file:
            for tensor in (t for t in file.keys() if t in own and own[t].is_floating_point()):
                if not torch.equal(file.get_tensor(tensor).to(own[tensor].dtype), own[tensor].cpu()):
                    files = {}
                    break
    if not files:
        return {"name_or_path": None, "revision": None, "fingerprint": fingerprint_in_memory(model)}
    revision = commit_of(files)
    return {"name_or_path": name, "revision": revision, "fingerprint": fingerprint_files(sorted(set(files.values())))}


def commit_of(files: Mapping[str, Path]) -> str | None:
    """The Hub commit that cached files belong to; None for a local folder."""
    return extract_commit_hash(str(next(iter(files.values()))), None) if files else None


def check_fingerprint(name: str, index: int, recorded: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Refuses an anchor whose weights are not those the bundle was trained on.

    Raises:
        ValueError: a part differs; names it, with both digests.
    """
    for part, digest in found.items():
        if recorded.get(part) != digest:
            raise ValueError(
                f"anchor {index} changed: {part} of {name} has digest {digest}, the bundle was trained on "
                f"{recorded.get(part)}; load the original weights (revision), or train again"
            )


def bundle_folder(name: str, hub: Mapping[str, Any]) -> Path:
    """The local folder of a bundle, fetched from the Hub where it is a repository.

    Raises:
        OSError: there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    options = {
        key: hub[key] for key in ("revision", "token", "cache_dir", "local_files_only") if hub.get(key) is not None
    }
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, TABLE, GENERATION], **options))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(f"{name!r} is neither a folder here nor a bundle on the Hub in reach: {reason}") from error


def load_anchors(
    config: Any,
    folder: Path,
    given: Sequence[Any] | None,
    stitches: Sequence[Stitch],
    load: Mapping[str, Any],
    hub: Mapping[str, Any],
) -> list[PreTrainedModel]:
    """The anchors of a bundle, each checked against the weights it was trained on.

    Args:
        config: the bundle's configuration.
        folder: of the bundle; a relative path of an anchor may also start there.
        given: folders, Hub ids or models to use instead of those the bundle names.
        stitches: only what these need is loaded.
        load, hub: options of each anchor's `from_pretrained`.

    Raises:
        ValueError: an anchor changed, or the bundle does not know where one lies.
        OSError: an anchor cannot be loaded.
    """
    hub = {name: value for name, value in hub.items() if name != "revision"}  # the bundle's is not the anchors'
    if not config.anchors:
        raise ValueError(
            "the bundle names no anchors, its model was not made by from_anchors: make it with from_anchors, then "
            "save it again"
        )
    if given is not None and len(given) != len(config.anchors):
        raise ValueError(f"{len(given)} anchors given, the bundle has {len(config.anchors)}")
    loaded = []
    for index, reference in enumerate(config.anchors):
        source = given[index] if given is not None else reference["name_or_path"]
        if source is None:
            raise ValueError(
                f"the bundle does not know where anchor {index} lies: pass anchors=[...] to from_pretrained"
            )
        if isinstance(source, PreTrainedModel):
            found = reference_to(source)["fingerprint"]  # of its files where it still equals them
            if found != reference["fingerprint"]:
                found = fingerprint_in_memory(source)
            check_fingerprint(f"the given model {index}", index, reference["fingerprint"], found)
            loaded.append(source)
            continue
        source = os.fspath(source)
        if not Path(source).is_dir() and (folder / source).is_dir():
            source = str(folder / source)
        revision = reference["revision"] if given is None else None
        options = {**load, **hub} | ({"revision": revision} if revision else {})
        spec = anchor_spec(config.anchor_configs[index])
        try:
            anchor, found = load_anchor(source, config.anchor_config(index), spec, index, stitches, **options)
        except OSError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OSError(
                f"anchor {index} of the bundle, {source!r}, cannot be loaded: {reason}; where it lies elsewhere now, pass "
                "anchors=[...] to from_pretrained"
            ) from error
        check_fingerprint(source, index, reference["fingerprint"], found)
        loaded.append(anchor)
    return loaded
