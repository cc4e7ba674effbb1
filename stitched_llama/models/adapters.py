"""PEFT both ways: an anchor's LoRA as a plain adapter folder, and an adapter folder as the start of an anchor's LoRA."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from stitched_llama.anchors import LlamaFamily
from stitched_llama.bundles import check_finite
from stitched_llama.pst import biases_of
from stitched_llama.space import read_object

from .export import new_folder
from .merging import adapted_layers

_PREFIX = "base_model.model."
_MORE = {  # what an adapter may have beside two factors a layer, and the values, beside null, that say it has not
    "bias": ("none",), "lora_bias": (False,), "use_dora": (False,), "modules_to_save": ([],),
    "rank_pattern": ({},), "alpha_pattern": ({},), "trainable_token_indices": ([],), "target_parameters": ([],),
    "use_qalora": (False,), "use_bdlora": (False,), "arrow_config": (), "alora_invocation_tokens": (), "layer_replication": (),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base too
}  # fmt: skip


class AdapterMixin:
    """`save_adapter` and `start_from_adapter` of stitched models."""

    @torch.no_grad()
    def save_adapter(self, anchor: int, folder: str | os.PathLike) -> None:
        """Writes one anchor's LoRA into a new folder, as `peft.PeftModel.from_pretrained` loads it onto the plain anchor; the biases
        that the anchor has as a stitch are those of its `lora_B` (`lora_bias`).

        Raises:
            ValueError: the anchor is an image model or not loaded whole, has no LoRA, or PST was merged; or something is at `folder`.
        """
        from peft import LoraConfig  # late: peft imports the Auto classes, which import us

        stitch = self.space.anchor_stitch(anchor)
        anchor = stitch.segments[0].anchor
        layers = list(self._lora_layers(anchor))
        if stitch.key not in self.keys:
            raise ValueError(f"anchor {anchor} was not loaded whole: load the bundle without stitch_id and budget")
        biases = biases_of(stitch, self.stitch_bias)
        tensors: dict[str, Tensor] = {}
        for name, layer, slot, number in layers:
            for factor in ("lora_A", "lora_B"):
                tensors[f"{_PREFIX}{name}.{factor}.weight"] = getattr(layer, factor)["default"].weight
            if biases is not None:
                tensors[f"{_PREFIX}{name}.lora_B.bias"] = biases[slot][number]
        reference = (self.config.anchors or [{}] * (anchor + 1))[anchor]
        rank = self.config.pst_config.ranks(self.space)[anchor]
        config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=reference.get("name_or_path"),
            revision=reference.get("revision"),
            r=rank,
            lora_alpha=rank,
            lora_dropout=self.config.pst_config.dropout,
            lora_bias=biases is not None,
            target_modules=sorted({name.split(".")[-1] for name, *_ in layers}),
            inference_mode=True,
        )
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        check_finite(tensors, "this model")
        with new_folder(Path(folder)) as stage:
            config.save_pretrained(stage)
            save_file(tensors, stage / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    @torch.no_grad()
    def start_from_adapter(self, anchor: int, folder: str | os.PathLike) -> None:
        """Sets an anchor's LoRA to one that PEFT saved for it: an Alpaca-LoRA, say, that is to be trained on with the stitches.
        Calibrate after it, so that the stitching layers fit what the anchor then computes.

        An adapter of lower rank than PST's fills the first of its dimensions, the others add nothing as yet.

        Raises:
            ValueError: PST is not attached, or was merged; the folder holds no LoRA in safetensors, one of a higher rank, one on other
                layers than q, k, v and o, or one that is more than two factors a layer.
        """
        anchor = self.space.anchor_stitch(anchor).segments[0].anchor
        layers = {name: layer for name, layer, *_ in self._lora_layers(anchor)}
        rank = self.config.pst_config.ranks(self.space)[anchor]
        settings, tensors = _read(Path(folder))
        scale = settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"])
        found = {name: (tensors[name], tensors[_other(name)]) for name in tensors if name.endswith(".lora_A.weight")}
        named = {name.removeprefix(_PREFIX).removesuffix(".lora_A.weight"): pair for name, pair in found.items()}
        if unknown := sorted(set(named) - set(layers)):
            raise ValueError(
                f"{folder} adapts {unknown[0]}, which PST does not adapt in anchor {anchor} ({self.space.anchors[anchor].depth} blocks): "
                "the adapter is of another model, or has to be merged into its base (PEFT's merge_and_unload), and that be stitched"
            )
        for name, (down, up) in named.items():
            a, b = (getattr(layers[name], factor)["default"].weight for factor in ("lora_A", "lora_B"))
            if down.shape[0] > rank:
                raise ValueError(
                    f"the adapter in {folder} has rank {down.shape[0]}, PST has {rank} on anchor {anchor}: attach PST with rank "
                    f"{down.shape[0]} or more"
                )
            if down.shape[1:] != a.shape[1:] or up.shape != (b.shape[0], down.shape[0]):
                raise ValueError(
                    f"{name} of the adapter in {folder} maps {down.shape[1]} numbers to {up.shape[0]}, in anchor {anchor} it maps "
                    f"{a.shape[1]} to {b.shape[0]}: the adapter is of another model"
                )
        for name, layer in layers.items():
            layer.lora_B["default"].weight.zero_()
            if name in named:
                down, up = named[name]
                layer.lora_A["default"].weight[: len(down)].copy_(down)
                layer.lora_B["default"].weight[:, : len(down)].copy_(up.float() * scale)

    def _lora_layers(self, anchor: int) -> Iterator[tuple[str, nn.Module, int, int]]:
        """(name in the anchor, layer, block, number in the block) of each layer with LoRA."""
        if not isinstance(self.families[anchor], LlamaFamily):
            raise ValueError(
                f"anchor {anchor} is a {self.space.anchors[anchor].family}: adapters are of decoders alone"
            )
        if self.is_merged:
            raise ValueError("PST was merged into the weights: load the bundle without merge")
        settings = self.config.pst_config
        if settings is None or settings.full or not settings.ranks(self.space)[anchor]:
            raise ValueError(f"anchor {anchor} has no LoRA: attach_pst(PSTConfig(rank=...)) gives it one")
        names = {id(module): name for name, module in self.anchors[anchor].named_modules()}
        for block, layer, _, name in adapted_layers(self, anchor):
            number = [n for n, *_ in self.space.anchors[anchor].blocks[block].adapted].index(name)
            yield names[id(layer)], layer, block, number


def _other(name: str) -> str:
    return name.replace(".lora_A.", ".lora_B.")


def _read(folder: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """Settings and tensors of an adapter, of two factors a layer and nothing else."""
    if not (folder / ADAPTER_CONFIG_NAME).is_file() or not (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        raise ValueError(f"{folder} holds no LoRA: {ADAPTER_CONFIG_NAME} and {ADAPTER_SAFE_WEIGHTS_NAME} are needed")
    settings = read_object(folder / ADAPTER_CONFIG_NAME)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is an adapter of type {settings.get('peft_type')!r}: LORA is needed")
    for name, allowed in _MORE.items():
        if settings.get(name) not in (None, *allowed):
            raise ValueError(
                f"the adapter in {folder} has {name}={settings[name]!r}, more than two factors a layer: merge it into its base (PEFT's "
                "merge_and_unload) and stitch what comes of it"
            )
    for name in ("r", "lora_alpha"):
        if (
            isinstance(settings.get(name), bool)
            or not isinstance(settings.get(name), int | float)
            or settings[name] <= 0
        ):
            raise ValueError(f"{name} of the adapter in {folder} is {settings.get(name)!r}: a number above 0 is needed")
    try:
        tensors = load_file(folder / ADAPTER_SAFE_WEIGHTS_NAME)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / ADAPTER_SAFE_WEIGHTS_NAME} is damaged: {error}") from None
    check_finite(tensors, str(folder))
    pairs = {_other(name): name for name in tensors if name.endswith(".lora_A.weight")}
    if not pairs or set(tensors) != {*pairs, *pairs.values()}:
        wrong = sorted(set(tensors) ^ {*pairs, *pairs.values()}) or ["no factor"]
        raise ValueError(f"{folder} does not hold two factors for each of its layers: {wrong[0]}")
    if wrong := [name for name, tensor in tensors.items() if tensor.ndim != 2]:
        raise ValueError(f"tensor {wrong[0]} of {folder} has {tensors[wrong[0]].ndim} dimensions, a factor has 2")
    return settings, tensors
