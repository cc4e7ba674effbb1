"""One anchor: loaded whole, or only the blocks a route needs."""

import copy
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from stitched_llama.anchors import FAMILIES, Family, LlamaFamily
from stitched_llama.bundles import part_of
from stitched_llama.pst import refuse_to_save
from stitched_llama.space import AnchorSpec, Stitch, anchor_spec, named

from .references import HUB_OPTIONS, anchor_config, check_placed, digests_of_files, weight_files

LOAD_OPTIONS = ("dtype", "quantization_config", "device_map", "max_memory", "offload_folder", "attn_implementation")


IN_PART = "only the blocks of some sizes were loaded of it: load the anchor by itself, from its folder or Hub id"


def take(kwargs: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Removes `names` from `kwargs` and returns those that were set."""
    taken = {name: kwargs.pop(name) for name in names if name in kwargs}
    return {name: value for name, value in taken.items() if value is not None}


def check_options(anchors: Iterable[Any], options: Mapping[str, Any]) -> None:
    """Refuses options of loading where an anchor is loaded already.

    Raises:
        ValueError: names the options.
    """
    given = [index for index, anchor in enumerate(anchors) if not isinstance(anchor, (str, os.PathLike))]
    if given and options:
        raise ValueError(
            f"{', '.join(options)} shape anchors as they are loaded, anchor {given[0]} is a model already: name folders or Hub ids"
        )


class Needed:
    """Which tensors of an anchor a set of routes needs; of an image anchor all but blocks."""

    def __init__(self, family: Family, spec: AnchorSpec, index: int, stitches: Iterable[Stitch]):
        routes = [stitch.segments for stitch in stitches]
        self.family = family
        self.blocks = {b for route in routes for s in route if s.anchor == index for b in range(s.start, s.stop)}
        self.head = self.embedding = True
        if isinstance(family, LlamaFamily):
            self.head = any(route[-1].anchor == index for route in routes)
            self.embedding = any(route[0].anchor == index for route in routes) or (self.head and spec.tied)
        self.all = len(self.blocks) == spec.depth and self.head and self.embedding

    def __call__(self, tensor: str) -> bool:
        """Of an anchor of LLaMA blocks: whether a tensor of this name is needed."""
        family = self.family
        if tensor.startswith(family.blocks_module + "."):
            return int(tensor.removeprefix(family.blocks_module + ".").split(".")[0]) in self.blocks
        if tensor.startswith(family.embedding_modules):
            return self.embedding
        return self.head if tensor.startswith(family.head_modules) else True

    def unused(self, model: nn.Module) -> list[str]:
        """The modules of an anchor that are not needed."""
        names = [name for number, name in enumerate(self.family.block_names(model)) if number not in self.blocks]
        names += () if self.embedding else self.family.embedding_modules
        return names + list(() if self.head else self.family.head_modules)


def load_plain(name_or_path: str, **options: Any) -> PreTrainedModel:
    """A decoder or image classifier from its own files, frozen, for what is measured or cut before anything is stitched.

    Args:
        options: of `from_pretrained` and the Hub; none of its code is run.

    Raises:
        ValueError: as `anchor_config` and `load_anchor` say.
        OSError: it is neither a folder nor in reach on the Hub.
    """
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    config = anchor_config(name_or_path, attention="attn_implementation" in options, **hub)
    with named(repr(name_or_path)):
        return load_anchor(name_or_path, config, anchor_spec(config.to_dict()), 0, None, whole=False, **options)[0]


def load_anchor(
    name_or_path: str,
    config: Any,
    spec: AnchorSpec,
    index: int,
    stitches: Iterable[Stitch] | None,
    new_head: bool = False,
    whole: bool | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, dict[str, dict[str, str]]]:
    """An anchor, frozen, with the digests of its parts (`whole` as `digests_of_files` has it); only the blocks, embedding and head that `stitches` need. One that is
    stored in 8 or 4 bits is read whole: only Transformers knows how its tensors belong together. With `new_head` a
    classifier that the checkpoint lacks is re-initialised.

    Raises:
        ValueError: there are no safetensors weights, a tensor is missing, or a part was put where it cannot be trained.
    """
    family = FAMILIES[spec.family]
    if not isinstance(family, LlamaFamily):
        how = {"whole": whole, "trust_remote_code": trust_remote_code, **options}
        return _load_image_anchor(name_or_path, config, family, index, stitches, new_head, **how)
    needed = None if stitches is None else Needed(family, spec, index, stitches)
    if needed is not None and (needed.all or getattr(config, "quantization_config", None)):
        needed = None
    files = weight_files(name_or_path, needed, **options)
    options.pop("force_download", None)  # what it asks for is done
    parts = None if needed is None else {part_of(tensor) for tensor in files}.__contains__
    digests = digests_of_files(files.values(), whole, parts)
    if needed is None:
        options["trust_remote_code"] = trust_remote_code
        model, info = family.auto_class().from_pretrained(
            name_or_path, config=config, use_safetensors=True, output_loading_info=True, **options
        )
        _let_go(model, family, index, stitches)
    else:
        options = {name: value for name, value in options.items() if name not in HUB_OPTIONS}
        if not files:  # not on any of these routes: no weight is left that could be quantised
            options.pop("quantization_config", None)
        model_class = partial_class(family.auto_class()._model_mapping[type(config)], needed)
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=_read(files), output_loading_info=True, **options
        )
        model.__class__ = model_class.__base__  # it was needed to build it; pickle knows this one
        refuse_to_save(model, IN_PART)
    _check_whole(name_or_path, info["missing_keys"])
    check_placed(name_or_path, model)
    model.requires_grad_(False)
    return model.eval(), digests


def _check_whole(name_or_path: str, missing: Iterable[str], heads: tuple[str, ...] = ()) -> None:
    missing = sorted(missing)
    if missing and heads and all(name.startswith(heads) for name in missing):
        raise ValueError(f"{name_or_path} has no classifier ({missing[0]}): pass num_labels or id2label for a new one")
    if missing:
        raise ValueError(
            f"{name_or_path} lacks {len(missing)} tensors, the first is {missing[0]}: "
            "the checkpoint is incomplete, download it again"
        )


def _load_image_anchor(
    name_or_path: str,
    config: Any,
    family: Family,
    index: int,
    stitches: Iterable[Stitch] | None,
    new_head: bool,
    whole: bool | None,
    **options: Any,
) -> tuple[PreTrainedModel, dict[str, dict[str, str]]]:
    """An image anchor, read whole (older checkpoints name their tensors otherwise); blocks off every route are let go.

    Its head is re-initialised where `config` has another number of classes than the checkpoint, and with `new_head` where that has none.
    """
    if any(name.endswith("WithTeacher") for name in getattr(config, "architectures", None) or ()):  # a distilled DeiT
        if not new_head:
            raise ValueError(
                f"{name_or_path} has two heads, for its class and its distillation token: pass num_labels or id2label for a new "
                "one, or take a checkpoint that was not distilled"
            )
        config = copy.deepcopy(config)
        config.architectures = []  # the class with one head
    digests = digests_of_files(weight_files(name_or_path, **options).values(), whole)
    options.pop("force_download", None)  # what it asks for is done
    if options.get("quantization_config") is not None:
        options["quantization_config"] = _but_heads(options["quantization_config"], family)
    reports = logging.getLogger("transformers.modeling_utils")
    level = reports.level
    reports.setLevel(logging.ERROR)  # of a head of other classes, which is looked after below
    try:
        model, info = family.auto_class().from_pretrained(
            name_or_path,
            config=config,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    finally:
        reports.setLevel(level)
    check_placed(name_or_path, model)
    renewed = {name for name, *_ in info["mismatched_keys"]}
    if new_head:
        renewed |= {name for name in info["missing_keys"] if name.startswith(family.head_modules)}
    _check_whole(name_or_path, set(info["missing_keys"]) - renewed, family.head_modules)
    if wrong := sorted(name for name in renewed if not name.startswith(family.head_modules)):
        raise ValueError(
            f"{name_or_path} and its config differ in the shape of {wrong[0]}: they do not belong together"
        )
    _let_go(model, family, index, stitches)
    model.requires_grad_(False)
    return model.eval(), digests


def _but_heads(settings: Any, family: Family) -> Any:
    """Settings of bitsandbytes that leave the classifier as it is: it may be a new one, and it trains."""
    settings = copy.deepcopy(settings)
    fields = settings if isinstance(settings, dict) else vars(settings)
    fields["llm_int8_skip_modules"] = [*(fields.get("llm_int8_skip_modules") or []), *family.head_modules]
    return settings


def _let_go(model: nn.Module, family: Family, index: int, stitches: Iterable[Stitch] | None) -> None:
    """Frees the blocks of an anchor that was read whole and that no route needs."""
    if stitches is not None:
        used = {block for stitch in stitches for anchor, block in stitch.blocks() if anchor == index}
        unused = [name for number, name in enumerate(family.block_names(model)) if number not in used]
        for name in unused:
            model.set_submodule(name, nn.Identity())
        if unused:
            refuse_to_save(model, IN_PART)


def partial_class(model_class: type[PreTrainedModel], needed: Needed) -> type[PreTrainedModel]:
    """The same model with everything that is not needed left empty, original block numbers kept."""

    def __init__(self, config):
        model_class.__init__(self, config)
        for name in needed.unused(self):
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
