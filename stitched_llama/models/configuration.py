"""What every stitched configuration holds, whatever its family."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from stitched_llama.bundles import CONFIG, TABLE, Bundle, reading, verify_digests
from stitched_llama.pst import PSTConfig
from stitched_llama.space import (
    BYTES_PER_NUMBER,
    SPACE_OPTIONS,
    AnchorSpec,
    Precision,
    StitchSpace,
    anchor_specs,
    fields_of,
    named,
    read_object,
    resolve_junctions,
)

from .config_fields import check_bundle_fields
from .references import anchor_config

_NOT_KEPT = ("_name_or_path", "transformers_version")


@strict
class StitchedConfig(PreTrainedConfig):
    """Configuration of a stitched model.

    Args:
        anchor_configs: the anchors' own configurations as JSON objects, small to large.
        anchors: where each anchor's weights are: `name_or_path`, `revision`, `fingerprint` (part -> digest); None where they are in
            the bundle itself.
        kernel_size, stride, direction, pairs, adapter, rescale, adapter_norm, across_stages, junctions, routes: options
            of `StitchSpace`.
        space_digest: of the space the weights were trained in; another space is refused.
        pst: settings of PST when it is attached (fields of `PSTConfig`).
        default_stitch_id: id or key that `forward` and `generate` take when none is given; None is the largest anchor.
        keys: the stitches a bundle holds; None is all of the space.
        stitching_dtype: `"int8"` when a bundle holds its stitching layers in 8 bits.
    """

    anchor_configs: list | None = None
    anchors: list | None = None
    kernel_size: int = 1
    stride: int = 1
    direction: str = "fast-to-slow"
    pairs: str = "nearest"
    adapter: str = "linear"
    rescale: str = "none"
    adapter_norm: str = "none"
    across_stages: bool = False
    junctions: list | None = None
    routes: list | None = None
    space_digest: str | None = None
    pst: dict | None = None
    default_stitch_id: int | str | None = None
    keys: list | None = None
    stitching_dtype: str | None = None

    @classmethod
    def from_anchor_configs(cls, configs: Sequence[Any], **options: Any):
        """A configuration from the anchors' own: folders, Hub ids, JSON objects or configuration objects.

        Raises:
            ValueError: the anchors do not belong together, or stand in the wrong order.
            OSError: a folder or Hub id has no configuration.
        """
        fields = [_fields(config) for config in configs]
        config = cls(anchor_configs=fields, **resolve_junctions(fields, options))
        config.space_digest = config.stitch_space().digest
        return config

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Same as in Transformers, for what the Auto classes pass: `anchors`, `attn_implementation` and `verify` go on to the
        model, and the `config.json` of a bundle is that of a whole save.

        Raises:
            ValueError: the bundle's `config.json` changed, or a field cannot be.
        """
        folder = Path(kwargs.get("name_or_path") or "")
        if kwargs.get("name_or_path") and (folder / TABLE).is_file():
            with reading(folder):
                if kwargs.get("verify", True):
                    verify_digests(folder, [CONFIG])
                config_dict = read_object(folder / CONFIG)
        if not kwargs.get("return_unused_kwargs"):
            return cls._checked(config_dict, str(folder / CONFIG), **kwargs)
        kept = {n: kwargs.pop(n) for n in ("anchors", "attn_implementation", "verify") if n in kwargs}
        config, unused = cls._checked(config_dict, str(folder / CONFIG), **kwargs)
        return config, unused | kept

    @classmethod
    def from_bundle(cls, bundle: Bundle):
        """The configuration of a bundle that was opened.

        Raises:
            ValueError: a field cannot be.
        """
        return cls._checked(bundle.config, str(bundle.folder / CONFIG))

    def updated_by(self, given: "StitchedConfig | None"):
        """What to load a bundle with, of the bundle's own configuration and one that the caller, or an Auto class, has.

        Where an Auto class read that one before the bundle was saved again, what the caller changed in it is set on this one.
        """
        if given is None or given._as_read in (None, self._as_read):
            return copy.deepcopy(self if given is None else given)
        before, config = vars(type(self)._checked(given._as_read, CONFIG)), copy.deepcopy(self)
        for name, value in vars(given).items():
            if name not in ("_as_read", "_name_or_path") and value != before.get(name):
                setattr(config, name, value)
        return config

    def check_keys(self, space: StitchSpace) -> None:
        """Refuses a list of stitches that is none of this space.

        Raises:
            ValueError: a key is unknown or stands twice, or there is none.
        """
        if self.keys is None:
            return
        known = {stitch.key for stitch in space}
        if not self.keys or len(self.keys) > len(known):
            raise ValueError(f"keys of config.json has {len(self.keys)} entries, the space has {len(known)} stitches")
        if wrong := [key for key in self.keys if not isinstance(key, str) or key not in known]:
            raise ValueError(f"keys of config.json has {wrong[0]!r}, which is no stitch of its space")
        if len(set(self.keys)) != len(self.keys):
            raise ValueError("keys of config.json names a stitch twice")

    @classmethod
    def _checked(cls, fields: Mapping[str, Any], where: str, **kwargs: Any):
        with named(where):
            check_bundle_fields(fields, where, cls)
            made = super().from_dict(copy.deepcopy(dict(fields)), **kwargs)
        (made[0] if isinstance(made, tuple) else made)._as_read = fields
        return made

    def _remove_keys_not_serialized(self, fields: dict[str, Any]) -> None:
        super()._remove_keys_not_serialized(fields)
        fields.pop("_as_read", None)

    _as_read = None  # the fields of the file that this configuration came from

    def stitch_space(self, precision: Precision = Precision()) -> StitchSpace:
        """The space this configuration describes, built anew.

        Raises:
            ValueError: there are no anchor configurations.
        """
        if not self.anchor_configs:
            raise ValueError(
                f"{type(self).__name__} names no anchors: build it with from_anchor_configs([small, large])"
            )
        return StitchSpace(
            self.anchor_specs(),
            **{name: getattr(self, name) for name in SPACE_OPTIONS},
            precision=precision,
        )

    def anchor_specs(self) -> list[AnchorSpec]:
        """The sizes of the anchors, small to large."""
        return anchor_specs(self.anchor_configs)

    def precision(self, dtype: Any = None, quantization_config: Any = None) -> Precision:
        """In which form the weights will be held when the anchors are loaded with these options; what is stored in 8 or 4 bits
        stays so."""
        if dtype in (None, "auto"):
            full = self.pst is not None and self.pst_config.full  # trained, and saved, in float32
            dtype = "float32" if full else self.anchor_configs[-1].get("dtype") or "float32"
        flags = {"8bit": "load_in_8bit", "4bit": "load_in_4bit"}
        stored = [c["quantization_config"] for c in self.anchor_configs if c.get("quantization_config")]
        settings = [
            s if isinstance(s, dict) else vars(s) for s in ([quantization_config] if quantization_config else stored)
        ]
        wanted = [n for n, flag in flags.items() if any(s.get(flag) or s.get(f"_{flag}") for s in settings)]
        name = str(dtype).removeprefix("torch.")
        return Precision(name if name in BYTES_PER_NUMBER else "float32", wanted[0] if wanted else None)

    def anchor_config(self, index: int) -> PreTrainedConfig:
        """The configuration object of anchor number `index`."""
        content = dict(self.anchor_configs[index])
        return AutoConfig.for_model(content.pop("model_type"), **content)

    @property
    def pst_config(self) -> PSTConfig | None:
        return None if self.pst is None else PSTConfig.from_dict(self.pst)


def _fields(config: Any) -> dict[str, Any]:
    config = fields_of(anchor_config(os.fspath(config)) if isinstance(config, (str, os.PathLike)) else config)
    common = PreTrainedConfig().to_dict()
    return {
        name: value
        for name, value in config.items()
        if name not in _NOT_KEPT and (name not in common or value != common[name] or name == "model_type")
    }
