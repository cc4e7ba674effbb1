"""Saving and loading a stitched model as a bundle, which names its anchors, or holds their weights where there are none to name."""

import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard
from transformers import GenerationConfig

from stitched_llama.bundles import CARD, CONFIG, GENERATION, Bundle, write_bundle
from stitched_llama.space import StitchSpace, StitchTable, format_bytes, named

from .bundle_anchors import bundle_folder, load_anchors
from .bundle_tensors import BundleTensors
from .card import model_card
from .config_fields import check_shadows
from .export import CODE, auto_map, code_of
from .loading import LOAD_OPTIONS, take
from .merging import quantised
from .references import HUB_OPTIONS
from .whole import anchors_inside, check_saves_whole

_UPLOAD = ("repo_id", "commit_message", "commit_description", "tags", "private", "token", "revision", "create_pr")
_FOR_INFERENCE = (
    "Saved for use, in {size}: what trained is in bfloat16, the low-rank updates are merged into the stitching layers. Metrics were "
    "measured before that rounding; train on from the bundle that this one was saved from."
)
_LOADED = {
    "missing_keys": set(),
    "unexpected_keys": set(),
    "mismatched_keys": set(),
    "error_msgs": [],
}  # else it is refused
_NO_MATTER = ("save_peft_format", "save_original_format", "save_function")
_REFUSED = {
    "max_shard_size": "the weights of a bundle are one file: leave it out",
    "variant": "the file of a bundle's weights has one name: save into another folder",
    "safe_serialization": "only safetensors are written and read: leave it out",
    "distributed_checkpoint": "a bundle is written whole by one process: leave it out",
}
_IGNORED = (
    "adapter_kwargs",
    "code_revision",
    "use_safetensors",
    "low_cpu_mem_usage",
    "weights_only",
)


class BundleMixin(BundleTensors):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of stitched models."""

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

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        stitches: str | None = None,
        push_to_hub: bool = False,
        stitching_dtype: str | None = "as loaded",
        for_inference: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves a bundle: trained parts, stitching layers, table, configs, model card, and the weights of the anchors where there are
        none to name, as in a model that was built from a configuration. An interrupted save changes nothing.

        Args:
            stitches: `"all"` (default), or `"published"` to leave out everything that no published stitch needs.
            stitching_dtype: `"int8"` halves the stitching layers' bytes against bfloat16, None keeps them as they are; by default
                as the bundle has them that this model was loaded from.
            for_inference: published stitches alone by default, the low-rank updates merged into the stitching layers, and what
                trained in bfloat16: for use, not for training on.
            kwargs: what `push_to_hub` takes; options of Transformers that mean nothing here are left alone.

        Metrics of the table that were measured on other weights than those that are saved are left out, with a warning.

        Raises:
            ValueError: `stitches` or `stitching_dtype` is unknown, an anchor lies in that folder, a weight is not finite, or an
                option of Transformers asks for what a bundle cannot be.
            TypeError: an unknown argument.
        """
        if stitches is None:
            stitches = "published" if for_inference else "all"
        if stitches not in ("all", "published"):
            raise ValueError(f"stitches {stitches!r} is unknown; 'all' or 'published' is needed")
        if stitching_dtype == "as loaded":
            stitching_dtype = self.config.stitching_dtype
        if stitching_dtype not in (None, "int8"):
            raise ValueError(f"stitching_dtype {stitching_dtype!r} is unknown; None or 'int8' is needed")
        if self.is_merged and self.config.anchors:
            raise ValueError(
                "PST was merged into the anchors' weights, and a bundle holds none of these: what was trained would be lost; load the "
                "bundle without merge to save it, or write one size with its weights by export(folder, stitch_id=...)"
            )
        if self.is_whole:
            check_saves_whole(self)
        upload = take(kwargs, _UPLOAD)
        self._check_options(kwargs)
        if not is_main_process:
            return
        names = [anchor["name_or_path"] for anchor in self.config.anchors or []]
        names += [getattr(anchor, "name_or_path", None) for anchor in self.anchors]
        homes = [Path(name).resolve() for name in names if name and Path(name).is_dir()]
        if Path(save_directory).resolve() in homes:
            raise ValueError(
                f"{save_directory} is the folder of an anchor, whose files the bundle would replace: save it elsewhere"
            )
        config = copy.deepcopy(self.config)
        config.architectures, config.stitching_dtype = [type(self).__name__], stitching_dtype
        keys = self.keys if stitches == "all" else [stitch.key for stitch in self.published]
        config.keys = None if len(keys) == len(self.space) else keys
        if self.is_whole:
            self.note_dtypes(config)
        if for_inference and config.pst is not None and not config.pst_config.full:
            config.pst["stitching_rank"] = 0
        space = config.stitch_space()
        texts = {}
        if getattr(config, "auto_map", None) == auto_map(type(self)):
            texts[CODE] = code_of(type(self))
        elif hasattr(config, "auto_map"):  # names code that would not be there
            del config.auto_map
        texts[CONFIG] = config.to_json_string()
        if self.can_generate():
            texts[GENERATION] = self.generation_config.to_json_string()
        table = self.table_to_save()
        tensors = self._bundle_tensors(keys, stitching_dtype, for_inference)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        note = _FOR_INFERENCE.format(size=format_bytes(size)) if for_inference else None
        texts[CARD] = model_card(config.anchors, space, [space[key] for key in keys], table, note)
        write_bundle(save_directory, tensors, table.to_dict(space, keys), texts)
        if push_to_hub:
            repo_id = upload.pop("repo_id", Path(save_directory).name)
            upload |= {"for_inference": True} if for_inference else {}
            self.push_to_hub(repo_id, stitches=stitches, stitching_dtype=stitching_dtype, **upload)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Refuses options of Transformers' `save_pretrained` that would change what is written there, and do not here."""
        if unknown := sorted(set(options) - {*_NO_MATTER, *_REFUSED, "state_dict"}):
            raise TypeError(f"save_pretrained got unknown arguments {unknown}")
        for name, reason in _REFUSED.items():
            if options.get(name) not in (None, name == "safe_serialization"):
                raise ValueError(f"{name}={options[name]!r} is not supported: {reason}")
        given = options.get("state_dict") or {}
        for name, tensor in self.named_parameters():
            if name in given and given[name].data_ptr() != tensor.data_ptr():
                if given[name].shape != tensor.shape or not torch.equal(given[name].to(tensor), tensor):
                    raise ValueError(f"state_dict has another {name} than this model: load_state_dict it, then save")

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Upload stitched bundle",
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: str | Sequence[str] | None = None,
        **save: Any,
    ):
        """Uploads the bundle with its own model card; `save` goes to `save_pretrained`. Returns the commit.

        Args:
            revision: a branch, made where it is not there yet.
            tags: of the model card, beside its own.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save)
            if tags:
                card = ModelCard.load(Path(folder) / CARD)
                card.data.tags = [*card.data.tags, *([tags] if isinstance(tags, str) else tags)]
                card.save(Path(folder) / CARD)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
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
