"""Making a stitched model from pretrained anchors."""

import copy
import os
from collections.abc import Sequence
from typing import Any

from stitched_llama.space import SPACE_OPTIONS

from .loading import LOAD_OPTIONS, check_options, load_anchor, take
from .references import HUB_OPTIONS, anchor_config, check_plain, commit_of, reference_to, weight_files


class AnchorsMixin:
    """`from_anchors` of stitched models, and what it refuses."""

    config_fields: tuple[str, ...] = ()  # what from_anchors passes on to each anchor's config
    own_fields: tuple[str, ...] = ()  # and to the stitched one

    @classmethod
    def check_names(cls, config: Any, names: Sequence[Any], **hub: Any) -> None:
        """Refuses anchors that their configs alone do not tell apart; a kind of model says how."""

    @classmethod
    def check_modality(cls, configs: Sequence[Any]) -> None:
        """Refuses anchors that read something else than this class does.

        Raises:
            ValueError: names the anchor.
        """
        for index, config in enumerate(configs):
            reads = "pixel_values" if hasattr(config, "num_channels") else "input_ids"
            if reads != cls.main_input_name:
                raise ValueError(
                    f"anchor {index} is a {config.model_type}, which reads {reads}; {cls.__name__} reads {cls.main_input_name}: "
                    "take the Stitched class of its family"
                )

    @classmethod
    def from_anchors(cls, anchors: Sequence[Any], **how: Any):
        """A stitched model from two or more pretrained anchors, small to large, its stitching layers not yet calibrated.

        Args:
            anchors: folders, Hub ids or loaded models. A loaded model becomes part of this one: it is frozen, and PST
                goes into it, as in PEFT.
            how: `kernel_size`, `stride`, `direction`, `pairs`, `adapter`, `rescale`, `adapter_norm`, `across_stages` shape the space; `image_size` is the size at which image anchors run that take any; `dtype`, `quantization_config`,
                `device_map`, `attn_implementation` and the Hub's options reach each anchor's `from_pretrained`;
                so does `trust_remote_code`, without which no code of an anchor's is run.

        Raises:
            ValueError: the anchors do not belong together or stand in the wrong order, both values are named; one carries adapters
                or was offloaded, is incomplete, or is a model beside an option of loading.
            OSError: a folder or Hub id has no configuration or cannot be fetched.
            TypeError: an unknown argument.
        """
        space = {name: how.pop(name) for name in SPACE_OPTIONS if name in how} | take(how, cls.own_fields)
        fields = {name: how.pop(name) for name in cls.config_fields if name in how}
        load, hub = take(how, LOAD_OPTIONS), take(how, HUB_OPTIONS)
        trust = bool(how.pop("trust_remote_code", False))
        if how:
            raise TypeError(f"from_anchors got unknown arguments {sorted(how)}")
        if isinstance(anchors, (str, os.PathLike)):
            raise ValueError(
                f"anchors is {os.fspath(anchors)!r}: a list of two or more anchors is needed, small to large"
            )
        check_options(anchors, {**fields, **load})
        names = [os.fspath(a) if isinstance(a, os.PathLike) else a for a in anchors]
        names = [os.path.abspath(a) if isinstance(a, str) and os.path.isdir(a) else a for a in names]
        given = {"trust_remote_code": trust, "attention": "attn_implementation" in load}
        configs = [anchor_config(a, **given, **fields, **hub) if isinstance(a, str) else _stored(a) for a in names]
        cls.check_modality(configs)
        config = cls.config_class.from_anchor_configs(configs, **space)
        cls.check_names(config, names, trust_remote_code=trust, **hub)
        loaded, references = [], []
        for index, (name, own) in enumerate(zip(names, configs)):
            if isinstance(name, str):
                spec = config.stitch_space().anchors[index]
                how = {"new_head": bool(fields), "whole": True, "trust_remote_code": trust}
                model, digests = load_anchor(name, own, spec, index, None, **how, **load, **hub)
                files = weight_files(name, **{**hub, "force_download": False})
                revision = commit_of(files) or hub.get("revision")
                references.append({"name_or_path": name, "revision": revision, **digests})
            else:
                check_plain(model := name, index)
                references.append(reference_to(model))
            loaded.append(model)
        config.anchors = references
        stitched = cls(config, anchors=loaded)
        if stitched.can_generate():
            stitched.generation_config = copy.deepcopy(loaded[-1].generation_config)
        return stitched.eval()


def _stored(model: Any) -> Any:
    """The config of a loaded model as its files have it: quantised only where these are, not where loading did that."""
    if getattr(model.config, "quantization_config", None) is None:
        return model.config
    config = copy.deepcopy(model.config)
    try:
        stored = anchor_config(model.name_or_path, attention=True)
    except (OSError, ValueError):
        stored = None
    del config.quantization_config
    if hasattr(stored, "quantization_config"):
        config.quantization_config = stored.quantization_config
    return config
