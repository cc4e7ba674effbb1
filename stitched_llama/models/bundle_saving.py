"""Saving a stitched model as a bundle, in a folder or on the Hub."""

import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard

from stitched_llama.bundles import CARD, CONFIG, GENERATION, write_bundle
from stitched_llama.space import format_bytes

from .bundle_tensors import BundleTensors
from .card import model_card
from .export import CODE, auto_map, code_of
from .loading import take
from .whole import check_saves_whole

_UPLOAD = ("repo_id", "commit_message", "commit_description", "tags", "private", "token", "revision", "create_pr")
_FOR_INFERENCE = (
    "Saved for use, in {size}: what trained is in bfloat16, the low-rank updates are merged into the stitching layers. Metrics were "
    "measured before that rounding; train on from the bundle that this one was saved from."
)
_NO_MATTER = ("save_peft_format", "save_original_format", "save_function")
_REFUSED = {
    "max_shard_size": "the weights of a bundle are one file: leave it out",
    "variant": "the file of a bundle's weights has one name: save into another folder",
    "safe_serialization": "only safetensors are written and read: leave it out",
    "distributed_checkpoint": "a bundle is written whole by one process: leave it out",
}


class BundleSaving(BundleTensors):
    """`save_pretrained` and `push_to_hub` of stitched models."""

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
