"""Attaches PST to anchors and stitching layers, and says what trains."""

import logging
from functools import partial
from typing import Any

import torch
from torch import nn

from stitched_llama.anchors import FAMILIES
from stitched_llama.space import StitchSpace

from .bias import StitchBias
from .config import PSTConfig
from .updates import StitchLora, install_update_hooks, takes_updates

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line at import, and for every 8-bit matmul, otherwise


def attach_pst(
    anchors: nn.ModuleList, stitching_layers: nn.ModuleDict, space: StitchSpace, config: PSTConfig, keys: list[str]
) -> tuple[StitchBias | None, StitchLora | None]:
    """Freezes everything, adds LoRA and the low-rank updates in place, and returns the biases of the stitches `keys` and the LoRA that
    stitches between the anchors share.

    Identity at initialisation: no output changes by a bit. Trainable tensors are float32 whatever the anchors are.

    Raises:
        ValueError: a rank that does not fit, or quantised anchors that are to train whole.
    """
    from peft import inject_adapter_in_model  # late: peft imports the Auto classes, which import us
    from peft.tuners.tuners_utils import BaseTunerLayer

    ranks, stitching_ranks = config.ranks(space), config.stitching_ranks(space)
    quantised = any(getattr(anchor, f"is_loaded_in_{bits}bit", False) for anchor in anchors for bits in (4, 8))
    if config.full and quantised:
        raise ValueError("quantised anchors cannot train whole: load them without quantization_config, or use LoRA")
    for module in (anchors, stitching_layers):
        module.requires_grad_(config.full)
    if config.full:
        anchors.float()
        stitching_layers.float()
        return None, None
    for anchor, spec, rank in zip(anchors, space.anchors, ranks):
        family, targets, biased = FAMILIES[spec.family], [], []
        for name, part in zip(family.block_names(anchor), spec.blocks):
            block = anchor.get_submodule(name)
            if isinstance(block, nn.Identity):  # not loaded
                continue
            layers = [layer for layer, *_ in part.adapted]
            owner = next(path for path, module in block.named_modules() if module is family.adapted(block))
            targets += [".".join(filter(None, (name, owner, layer))) for layer in layers]
            biased.append((block, layers))
        if rank and targets:
            inject_adapter_in_model(_lora(rank, targets, config), anchor)
            show_convolutions(anchor)
        if config.stitch_bias or config.stitch_rank:
            for block, layers in biased:
                install_update_hooks(family, block, layers)
    for anchor in anchors:
        refuse_to_save(
            anchor,
            "it carries PST: save the stitched model, write one size as a model of its own by export(folder, stitch_id=...), or load "
            "the anchor anew from its own folder or Hub id",
        )
    for name, layer in stitching_layers.items():
        rank, core = stitching_ranks[name], list(layer.core.parameters())
        if rank:
            inject_adapter_in_model(_lora(rank, ["proj"], config), layer)
        for parameter in layer.parameters():
            if rank is None or (rank and not any(parameter is frozen for frozen in core)):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
    for name, parameter in anchors.named_parameters():
        if is_low_rank(name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    for module in [*anchors.modules(), *stitching_layers.modules()]:
        if isinstance(module, BaseTunerLayer):
            module.update_layer = refuse_another  # PEFT would begin the same layer anew, or switch this one off
    stitches = [space[key] for key in keys]
    index, block = stitches[0].blocks()[0]
    name = FAMILIES[space.anchors[index].family].block_names(anchors[index])[block]
    device = next(anchors[index].get_submodule(name).parameters()).device
    between = [stitch for stitch in stitches if not stitch.is_anchor]
    lora = None
    if config.stitch_rank:
        blocks = [block for stitch in between for block in stitch.blocks()]
        lora = StitchLora(space, blocks, config.stitch_rank, torch.float32, device)
    biased = between if config.stitch_rank else stitches
    return StitchBias(space, biased, torch.float32, device) if config.stitch_bias else None, lora


def refuse_another(*args: Any, **kwargs: Any) -> None:
    """What PEFT calls to put one more adapter into a layer.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "this layer carries PST already, and another adapter would undo it: train it on with StitchTrainer, or put the adapter into "
        "the anchors and stitch what comes of merging it"
    )


def refuse_to_save(model: Any, reason: str) -> None:
    """Makes `save_pretrained` of one anchor raise, as what it would write could not be loaded as that model.

    It raises a ValueError, always.
    """
    model.save_pretrained = partial(_refuse_to_save, type(model).__name__, reason)


def _refuse_to_save(name: str, reason: str, *args: Any, **kwargs: Any) -> None:
    raise ValueError(f"this {name} is an anchor inside a stitched model and cannot be saved by itself: {reason}")


def show_convolutions(model: nn.Module) -> None:
    """Gives PEFT's wrapped convolutions the sizes of what they wrap: MobileNetV2 pads by what it reads off them."""
    for module in model.modules():
        if isinstance(convolution := getattr(module, "base_layer", None), nn.Conv2d):
            for name in ("stride", "kernel_size", "dilation"):
                setattr(module, name, getattr(convolution, name))


def carries_adapters(model: nn.Module) -> bool:
    """Whether PEFT's layers, or this package's stitch bias, sit in a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) or takes_updates(module) for module in model.modules())


def is_low_rank(name: str) -> bool:
    """Whether a parameter name is of a LoRA branch."""
    return ".lora_A." in name or ".lora_B." in name


def _lora(rank: int, names: list[str], config: PSTConfig):
    from peft import LoraConfig

    # alpha = rank: scale 1
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=names, lora_dropout=config.dropout)
