"""Loading a stitched model from a bundle, which names its anchors, or holds their weights where there are none to name."""

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from stitched_llama.bundles import CONFIG, GENERATION, Bundle
from stitched_llama.space import StitchSpace, StitchTable, named

from .bundle_anchors import bundle_folder, load_anchors
from .config_fields import check_shadows
from .loading import LOAD_OPTIONS, take
from .merging import quantised
from .references import HUB_OPTIONS
from .whole import anchors_inside

_LOADED = {
    "missing_keys": set(),
    "unexpected_keys": set(),
    "mismatched_keys": set(),
    "error_msgs": [],
}  # else it is refused
_IGNORED = (
    "adapter_kwargs",
    "code_revision",
    "use_safetensors",
    "low_cpu_mem_usage",
    "weights_only",
)


class BundleLoading:
    """`from_pretrained` of stitched models, and the check of a bundle's table."""

    config_class: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """Loads a bundle and its anchors, which lie in it where the model has none to name; nothing is initialised anew and no code
        is run.

        Args:
            pretrained_model_name_or_path: a folder or a Hub repository that holds a bundle.
            stitch_id, budget: load only what this one size needs from disk or the Hub.
            context_tokens: tokens of KV cache that a budget of memory must also hold.
            anchors: folders, Hub ids or models to use instead of those the bundle names.
            dtype, quantization_config, device_map, attn_implementation: reach each anchor.
            verify: compare the bundle's files with its digests, and anchors with theirs: of less than a GiB whole, of larger ones
                samples, or all of them whole with `"full"`. False leaves the bundle's files as they are, for one that was edited
                on purpose; anchors are compared all the same.
            output_loading_info: return also what is missing or unexpected, which is nothing.
            merge: merge PST into the weights (`merge_pst`), for use at full speed; such a model trains no more.
            trust_remote_code: run the code of anchors that you name by `anchors`; never that of a bundle.

        Raises:
            ValueError: a file or an anchor changed, a tensor is missing, unused, not finite or has another shape, the space differs,
                no such stitch, the budget is too small, or both are given, or anchors are quantised where PST is to be merged.
            OSError: the bundle or an anchor is neither a folder nor in reach on the Hub.
            TypeError: an unknown argument.
        """
        if pretrained_model_name_or_path is None:
            raise ValueError(
                f"from_pretrained needs the folder or Hub id of a bundle; {cls.__name__}(config) makes a new model"
            )
        name = os.fspath(pretrained_model_name_or_path)
        if kwargs.get("stitch_id") is not None and kwargs.get("budget") is not None:
            raise ValueError(
                f"stitch_id {kwargs['stitch_id']!r} and budget {kwargs['budget']!r} both given: pass one of them"
            )
        wanted = {key: kwargs.pop(key, None) for key in ("stitch_id", "budget", "anchors", "config")}
        context_tokens, verify = kwargs.pop("context_tokens", 0), kwargs.pop("verify", True)
        if verify not in (True, False, "full"):
            raise ValueError(f"verify is {verify!r}; True, False or 'full' is needed")
        merge, with_info = bool(kwargs.pop("merge", False)), bool(kwargs.pop("output_loading_info", False))
        trust = bool(kwargs.pop("trust_remote_code", False)) and wanted["anchors"] is not None
        if "torch_dtype" in kwargs:  # what Transformers 4 called dtype
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        load, hub = take(kwargs, LOAD_OPTIONS), take(kwargs, HUB_OPTIONS)
        kwargs = {key: v for key, v in kwargs.items() if key not in _IGNORED and not key.startswith("_")}
        bundle = Bundle.open(bundle_folder(name, hub), verify=bool(verify))
        kind = bundle.config.get("model_type")
        if kind != cls.config_class.model_type:
            raise ValueError(
                f"{name} is a bundle of {kind}, {cls.__name__} loads {cls.config_class.model_type}: "
                "AutoModelForCausalLM and AutoModelForImageClassification find the class by themselves"
            )
        own = cls.config_class.from_bundle(bundle)
        config = own.updated_by(wanted["config"])
        for key, value in kwargs.items():
            if hasattr(config, key):
                setattr(config, key, value)
            elif value is not None and value is not False and value != "":  # else an option of Transformers, left alone
                raise TypeError(f"from_pretrained got an unknown argument {key!r}")
        if cls.config_fields and config.num_labels != own.num_labels:
            raise ValueError(
                f"{config.num_labels} labels are asked for, the heads of {name} have {own.num_labels}: make a model of your "
                "classes by from_anchors(..., num_labels=...)"
            )
        with named(bundle.folder / CONFIG):
            precision = config.precision(load.get("dtype"), load.get("quantization_config"))
            space = config.stitch_space(precision)
        if space.digest != bundle.table["space_digest"]:
            raise ValueError(
                f"{name} was trained in space {bundle.table['space_digest']}, its config describes {space.digest}: "
                "the config was edited, or the rules of this version differ"
            )
        with named(bundle.folder):
            own.check_keys(space)
            config.check_keys(space)
            table = check_table(bundle.table, space, own.keys)
        if config.pst is not None:
            table = table.in_training()
            if merge and precision.quantization is not None:
                raise ValueError(quantised(precision.quantization))
        if wanted["budget"] is not None:
            config.keys = [table.choose(space, wanted["budget"], context_tokens, keys=config.keys).key]
        elif wanted["stitch_id"] is not None:
            stitch = space[wanted["stitch_id"]]
            if config.keys is not None and stitch.key not in config.keys:
                raise ValueError(
                    f"stitch {stitch.stitch_id} ({stitch.key}) is not in {name}: it holds {config.keys}; ask for one of these, or "
                    "load the bundle it was cut from"
                )
            config.keys = [stitch.key]
        stitches = list(space) if config.keys is None else [space[key] for key in config.keys]
        with named(bundle.folder / CONFIG):
            pst = config.pst_config
        whole = True if verify == "full" else None
        if config.anchors or wanted["anchors"] is not None:
            loaded = load_anchors(config, bundle.folder, wanted["anchors"], stitches, load, hub, whole, trust)
        else:
            with named(bundle.folder):
                loaded = anchors_inside(config, space, bundle, stitches, load)
        with named(bundle.folder):
            model = cls(config, anchors=loaded)
            if pst is not None:
                config.pst = None
                model.attach_pst(pst)
            model.load_bundle(bundle)
        if pst is not None and pst.full and load.get("dtype") not in (None, "auto"):
            dtype = load["dtype"]
            model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        model.table = table
        if bundle.generation is not None:
            with named(where := str(bundle.folder / GENERATION)):
                check_shadows(bundle.generation, where, GenerationConfig)
                model.generation_config = GenerationConfig.from_dict(dict(bundle.generation))
        config._name_or_path = name
        if merge:
            model.merge_pst()
        return (model.eval(), copy.deepcopy(_LOADED)) if with_info else model.eval()

    @classmethod
    def check_tables(cls, bundle: Bundle) -> None:
        """Refuses a table that is not, to the last cost and mark, what the bundle's configuration and metrics give.

        Raises:
            ValueError: names what differs.
        """
        with named(bundle.folder):
            config = cls.config_class.from_bundle(bundle)
            space = config.stitch_space()
            config.check_keys(space)
            expected = check_table(bundle.table, space, config.keys).to_dict(space, config.keys)
            for ours, theirs in zip(expected["stitches"], bundle.table["stitches"]):
                if wrong := [n for n in ours | theirs if not _same(ours.get(n), theirs.get(n))]:
                    raise ValueError(
                        f"stitches.json has {wrong[0]} {theirs.get(wrong[0])!r} for stitch {ours['key']}, its config.json and metrics "
                        f"give {ours.get(wrong[0])!r}"
                    )
            if wrong := [n for n in expected if n != "stitches" and expected[n] != bundle.table.get(n)]:
                raise ValueError(
                    f"stitches.json has {wrong[0]} {bundle.table.get(wrong[0])!r}, {expected[wrong[0]]!r} is right"
                )


def _same(one: Any, other: Any) -> bool:
    """Equal, NaN to NaN too."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    return one == other or (one != one and other != other)


def check_table(content: Mapping[str, Any], space: StitchSpace, keys: Sequence[str] | None) -> StitchTable:
    """The table of a bundle, whose rows are the stitches it holds.

    Raises:
        ValueError: it is damaged, or has a row too many, too few, or of another stitch, or an anchor alone that is none.
    """
    table = StitchTable.from_dict(content)
    if strange := [
        key for key in table.alone if key not in {space.anchor_stitch(i).key for i in range(len(space.anchors))}
    ]:
        raise ValueError(f"stitches.json has an anchor alone as {strange[0][:200]!r}, which is no anchor of its space")
    held = list(space) if keys is None else sorted((space[key] for key in keys), key=lambda stitch: stitch.stitch_id)
    wanted = [(stitch.stitch_id, stitch.key) for stitch in held]
    if (found := [(row.get("stitch_id"), row.get("key")) for row in content["stitches"]]) != wanted:
        raise ValueError(f"stitches.json has {len(found)} stitches, or others, where config.json has {len(wanted)}")
    return table
