"""A shrunk model stored as a 4-bit difference from its initialisation, to be distributed without the large model.

Only for decoders cut in depth alone: embedding and head are the large model's, and each block is its initial block plus the
difference. The numbers of a difference are quantised in groups of 128 with one scale each; two numbers share a byte.
The record beside them has the SHA-256 of the differences and of the initialisation.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from stitched_llama.bundles import check_finite, dump_json, fingerprint_tensors, sha256, staged_files
from stitched_llama.space import lineage_of, named, read_object

from .cut import check_lineage, cut_model

GROUP = 128
DELTA, RECORD = "delta.safetensors", "delta.json"
_DIGESTS = ("cut_sha256", "delta_sha256")


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [numbers / 2] and float16 scales [groups] of a tensor of any shape; the last group may be shorter."""
    numbers = weight.float().flatten()
    padded = torch.nn.functional.pad(numbers, (0, -len(numbers) % GROUP)).view(-1, GROUP)
    scales = (padded.abs().amax(1) / 7).clamp_min(1e-8).half()
    codes = (padded / scales.float()[:, None]).round().clamp(-7, 7).to(torch.int8) + 8
    pairs = codes.flatten().to(torch.uint8).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4), scales


def dequantize_groups(packed: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:
    """The float32 tensor of `shape` that `quantize_groups` packed."""
    codes = torch.stack([packed & 15, packed >> 4], 1).to(torch.float32).view(-1, GROUP) - 8
    return (codes * scales.float()[:, None]).flatten()[: shape.numel()].view(shape)


@torch.no_grad()
def save_delta(small: PreTrainedModel, large: PreTrainedModel, folder: str | Path) -> None:
    """Writes the difference of a shrunk model from its initialisation; an interrupted save changes nothing.

    Raises:
        ValueError: it was not cut from `large` in depth alone, does not share its embedding, or a weight is not finite or too far from the
            cut for float16.
    """
    lineage = getattr(small.config, "shrunk_from", None) or {}
    cut = cut_model(large, small.config.num_hidden_layers)
    check_lineage(small, cut, large)
    if "embedding" not in lineage.get("shared", ()):
        raise ValueError(
            "the small model has an embedding of its own: only one that shares the large model's is stored as a difference"
        )
    before, tensors = cut.model.state_dict(), {}
    check_finite(small.state_dict(), "the small model")
    for name, tensor in small.state_dict().items():
        if name.startswith("model.layers.") or name == "model.norm.weight":
            difference = tensor.float() - before[name].float()
            if tensor.ndim > 1:
                tensors[name], tensors[f"{name}.scales"] = quantize_groups(difference)
            else:
                tensors[name] = difference.half()
        elif not torch.equal(tensor.float(), before[name].float()):
            raise ValueError(
                f"the small model says that it shares {name} with the model it was cut from, and has another: give the model that it "
                "was cut from"
            )
    check_finite(tensors, "the difference in float16")
    with staged_files(folder) as stage:
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, stage / DELTA, metadata={"format": "pt"})
        digests = {"cut_sha256": _cut_digest(before), "delta_sha256": sha256(stage / DELTA)}
        (stage / RECORD).write_text(dump_json({"shrunk_from": dict(lineage), **digests}), encoding="utf-8")


@torch.no_grad()
def load_delta(large: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """The small model that `save_delta` wrote, from the model it was cut from.

    Raises:
        ValueError: a file is missing, damaged or changed, a number is not finite, or `large` is not the model it was cut from.
    """
    folder = Path(folder)
    for name in (DELTA, RECORD):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: name a folder written by save_delta")
    lineage = _read_record(folder)
    if large.config.num_hidden_layers != lineage["depth"]:
        raise ValueError(
            f"the model has {large.config.num_hidden_layers} blocks, the difference in {folder} is to one of {lineage['depth']}: give the "
            f"model it was cut from ({lineage.get('name_or_path')})"
        )
    cut = cut_model(large, len(lineage["target_blocks"]))
    small, own, record = cut.model, cut.model.state_dict(), read_object(folder / RECORD)
    small.config.shrunk_from = lineage
    check_lineage(small, cut, large)
    if (found := _cut_digest(own)) != record["cut_sha256"]:
        raise ValueError(
            f"the weights of the given model, cut to {len(cut.target_blocks)} blocks, have SHA-256 {found}, the difference in {folder} "
            f"is to {record['cut_sha256']}: give the model it was cut from ({lineage.get('name_or_path')}), in the dtype it is stored "
            "in or a wider one"
        )
    tensors = _read_delta(folder / DELTA, record["delta_sha256"])
    names = {name for name in tensors if not name.endswith(".scales")}
    wanted = {name for name in own if name.startswith("model.layers.") or name == "model.norm.weight"}
    if names != wanted:
        raise ValueError(f"{folder / DELTA} and the model differ in {min(names ^ wanted)}: they do not belong together")
    scales = {f"{name}.scales" for name in names if own[name].ndim > 1}
    if odd := scales ^ (tensors.keys() - names):
        raise ValueError(
            f"{folder / DELTA} lacks scales or has some of nothing, the first is {min(odd)}: save it again"
        )
    for name in names:
        target = own[name]
        count = -(-target.numel() // GROUP)
        wanted_parts = {name: (torch.float16, tuple(target.shape))}
        if target.ndim > 1:
            wanted_parts = {name: (torch.uint8, (count * GROUP // 2,)), f"{name}.scales": (torch.float16, (count,))}
        for part, (dtype, shape) in wanted_parts.items():
            if tensors[part].dtype != dtype or tensors[part].shape != shape:
                raise ValueError(
                    f"{part} of {folder / DELTA} is {tensors[part].dtype} {list(tensors[part].shape)}, the model's {list(target.shape)} "
                    f"need {dtype} {list(shape)}: save it again"
                )
        if target.ndim > 1:
            difference = dequantize_groups(tensors[name], tensors[f"{name}.scales"], target.shape)
        else:
            difference = tensors[name].float()
        target.copy_((target.float() + difference.to(target.device)).to(target.dtype))
    return small


def _read_record(folder: Path) -> dict[str, Any]:
    """`shrunk_from` of the record, checked."""
    record = read_object(folder / RECORD)
    if missing := [name for name in _DIGESTS if not isinstance(record.get(name), str)]:
        raise ValueError(
            f"{folder / RECORD} has no {missing[0]}: it is damaged, or older than digests; save the difference again by save_delta"
        )
    lineage = record.get("shrunk_from")
    targets = lineage.get("target_blocks") if isinstance(lineage, dict) else None
    with named(folder / RECORD):
        if (
            lineage_of({"shrunk_from": lineage, "num_hidden_layers": len(targets) if isinstance(targets, list) else 0})
            is None
        ):
            raise ValueError("it has no shrunk_from: save the difference again by save_delta")
    return lineage


def _read_delta(path: Path, recorded: str) -> dict[str, Tensor]:
    if (found := sha256(path)) != recorded:
        raise ValueError(
            f"{path} changed: it has SHA-256 {found}, {RECORD} says {recorded}; restore or download it again"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}: save or download it again") from None
    check_finite(tensors, str(path))
    return tensors


def _cut_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of a cut's weights as float32, so that it is the same in every dtype that holds them exactly."""
    parts = fingerprint_tensors({name: tensor.float() for name, tensor in weights.items()}, whole=True)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
