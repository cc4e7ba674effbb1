"""A shrunk model stored as a 4-bit difference from its initialisation, to be distributed without the large model.

Only for decoders cut in depth alone: embedding and head are the large model's, and each block is its initial block plus the
difference. The numbers of a difference are quantised in groups of 128 with one scale each; two numbers share a byte.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .cut import check_lineage, cut_model

GROUP = 128
DELTA, RECORD = "delta.safetensors", "delta.json"


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
    """Writes the difference of a shrunk model from its initialisation.

    Raises:
        ValueError: it was not cut from `large` in depth alone, or does not share its embedding.
    """
    lineage = getattr(small.config, "shrunk_from", None) or {}
    cut = cut_model(large, small.config.num_hidden_layers)
    check_lineage(small, cut, large)
    if "embedding" not in lineage.get("shared", ()):
        raise ValueError(
            "the small model has an embedding of its own: only one that shares the large model's is stored as a difference"
        )
    before, tensors = cut.model.state_dict(), {}
    for name, tensor in small.state_dict().items():
        if name.startswith("model.layers.") or name == "model.norm.weight":
            difference = tensor.float() - before[name].float()
            if tensor.ndim > 1:
                tensors[name], tensors[f"{name}.scales"] = quantize_groups(difference)
            else:
                tensors[name] = difference.half()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / DELTA, metadata={"format": "pt"}
    )
    (folder / RECORD).write_text(json.dumps({"shrunk_from": lineage}, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def load_delta(large: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """The small model that `save_delta` wrote, from the model it was cut from.

    Raises:
        ValueError: a file is missing or damaged, or `large` is not of the shape it was cut from.
    """
    folder = Path(folder)
    for name in (DELTA, RECORD):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: name a folder written by save_delta")
    lineage = json.loads((folder / RECORD).read_text(encoding="utf-8"))["shrunk_from"]
    if large.config.num_hidden_layers != lineage["depth"]:
        raise ValueError(
            f"the model has {large.config.num_hidden_layers} blocks, the difference in {folder} is to one of {lineage['depth']}: give the "
            f"model it was cut from ({lineage['name_or_path']})"
        )
    small = cut_model(large, len(lineage["target_blocks"])).model
    small.config.shrunk_from = lineage
    tensors, own = load_file(folder / DELTA), small.state_dict()
    names = {name for name in tensors if not name.endswith(".scales")}
    wanted = {name for name in own if name.startswith("model.layers.") or name == "model.norm.weight"}
    if names != wanted:
        raise ValueError(f"{folder / DELTA} and the model differ in {min(names ^ wanted)}: they do not belong together")
    for name in names:
        target = own[name]
        if target.ndim > 1:
            count = -(-target.numel() // GROUP)
            if tensors[f"{name}.scales"].shape != (count,) or tensors[name].shape != (count * GROUP // 2,):
                raise ValueError(f"{name} of {folder / DELTA} has another shape than the model's {list(target.shape)}")
            difference = dequantize_groups(tensors[name], tensors[f"{name}.scales"], target.shape)
        else:
            difference = tensors[name].float()
        target.copy_((target.float() + difference).to(target.dtype))
    return small
