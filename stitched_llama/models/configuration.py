"""What every stitched configuration holds, whatever its family."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from stitched_llama.bundles import CONFIG, recover
from stitched_llama.pst import PSTConfig
from stitched_llama.space import (
    BYTES_PER_NUMBER,
    SPACE_OPTIONS,
    AnchorSpec,
    Precision,
    StitchSpace,
    anchor_specs,
    fields_of,
)

_NOT_KEPT = ("_name_or_path", "transformers_version")


@strict
class StitchedConfig(PreTrainedConfig):
    """Configuration of a stitched model.

    Args:
        anchor_configs: the anchors' own configurations as JSON objects, small to large.
        anchors: where each anchor's weights are: `name_or_path`, `revision`, `fingerprint` (part -> digest).
        kernel_size, stride, direction, pairs, adapter, rescale, adapter_norm, across_stages: options of `StitchSpace`.
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
        config = cls(anchor_configs=fields, **options)
        config.space_digest = config.stitch_space().digest
        return config

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As Transformers has it, for what the Auto classes pass: `anchors` and `attn_implementation` go on to the
        model, and a save that was interrupted is finished before its `config.json` is taken."""
        folder = Path(kwargs.get("name_or_path") or "")
        if kwargs.get("name_or_path") and (folder / CONFIG).is_file():
            recover(folder)
            config_dict = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not kwargs.get("return_unused_kwargs"):
            return super().from_dict(config_dict, **kwargs)
        kept = {name: kwargs.pop(name) for name in ("anchors", "attn_implementation") if name in kwargs}
        config, unused = super().from_dict(config_dict, **kwargs)
        return config, unused | kept

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
    config = fields_of(AutoConfig.from_pretrained(config) if isinstance(config, (str, os.PathLike)) else config)
    common = PreTrainedConfig().to_dict()
    return {
        name: value
        for name, value in config.items()
        if name not in _NOT_KEPT and (name not in common or value != common[name] or name == "model_type")
    }
