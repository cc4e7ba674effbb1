"""PST merged into the weights, once for all sizes: what is left to add in a forward is the bias of each stitch."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stitched_llama.pst import PSTConfig, StitchLora
from stitched_llama.space import StitchSpace

_ADAPTER = "default"  # PEFT's name for the one there is


class MergingMixin:
    """`merge_pst` of stitched models."""

    anchors: nn.ModuleList
    stitching_layers: nn.ModuleDict
    stitch_bias: Any
    stitch_lora: StitchLora | None
    space: StitchSpace
    families: Sequence[Any]
    config: Any
    keys: list[str]
    same_outputs: Any

    @property
    def is_merged(self) -> bool:
        """Whether PST was merged into the weights, which the bundle's anchors then no longer are."""
        return getattr(self.anchors, "pst_merged", False)  # kept where all views of a model see it

    def merge_obstacle(self) -> str | None:
        """Why PST cannot be merged, with the way out; None where it can be."""
        found = loaded_bits(self.anchors)
        if found is None and all(getattr(a.config, "quantization_config", None) is None for a in self.anchors):
            return None
        return quantised(found)

    @torch.no_grad()
    def merge_pst(self) -> tuple[str, ...]:
        """Adds each anchor's LoRA to its weights and the low-rank updates to the stitching layers; nothing trains any more.

        The sum is taken in float32 and rounded once to the dtype of the weights. A LoRA of the stitches' own
        (`PSTConfig(stitch_rank=...)`), which anchors do without, is merged where no anchor runs alone (a bundle loaded for one
        stitch), and is added in each forward otherwise. Where anchors trained whole, or PST was never attached, nothing is done.

        Returns:
            The names of what is still added in a forward: `stitch_bias`, `stitch_lora`.

        Raises:
            ValueError: an anchor is quantised, or PST was merged already.
        """
        if self.is_merged:
            raise ValueError("PST is merged already: load the bundle anew for another copy of it")
        settings = self.config.pst_config
        if settings is None or settings.full:
            return ()
        if obstacle := self.merge_obstacle():
            raise ValueError(obstacle)
        with self.same_outputs():
            self._merge()
        left = settings_left(self.stitch_bias is not None, self.stitch_lora)
        self.config.pst = None if left is None else left.to_dict()
        return tuple(name for name in ("stitch_bias", "stitch_lora") if getattr(self, name) is not None)

    def _merge(self) -> None:
        self.anchors.pst_merged = True  # first: a model that an interrupt leaves half merged cannot be saved
        own_lora = self.stitch_lora
        if own_lora is not None and any(self.space[key].is_anchor for key in self.keys):
            own_lora = None
        for index, anchor in enumerate(self.anchors):
            for block, layer, owner, name in adapted_layers(self, index):
                weight = merged_weight(layer, own_lora and own_lora.factors(index, block, name))
                _put(owner, name, layer, weight)
            vars(anchor).pop("peft_config", None)
        for layer in self.stitching_layers.values():
            _put(layer, "proj", layer.proj, merged_weight(layer.proj))
            vars(layer).pop("peft_config", None)
        if own_lora is not None or (self.stitch_lora is not None and not self.stitch_lora.down):
            self.stitch_lora = None
        if self.stitch_bias is not None and not self.stitch_bias.vectors:  # of an anchor alone, beside stitch_rank
            self.stitch_bias = None
        self.requires_grad_(False)


def loaded_bits(anchors: Iterable[nn.Module]) -> str | None:
    """`"8bit"` or `"4bit"` where bitsandbytes loaded an anchor so, else None."""
    anchors = list(anchors)
    return next(
        (bits for bits in ("8bit", "4bit") if any(getattr(a, f"is_loaded_in_{bits}", False) for a in anchors)), None
    )


def quantised(bits: str | None) -> str:
    """Why PST is not merged into anchors in 8 or 4 bits, with the way out."""
    form = {"8bit": "8 bits", "4bit": "4 bits"}.get(bits or "", "a quantised form")
    return (
        f"PST cannot be merged into anchors in {form}, and no size exported: their weights would be rounded once more, by 1 to 2 %; "
        "load them without quantization_config (dtype='bfloat16'), or where they are stored so run them without merge"
    )


def settings_left(bias: bool, lora: StitchLora | None = None) -> PSTConfig | None:
    """The settings of PST of which nothing but biases, and the LoRA of the stitches, is not in the weights."""
    rank = 0 if lora is None else next(iter(lora.down.values())).shape[0]
    return PSTConfig(rank=0, stitch_rank=rank, stitching_rank=0, stitch_bias=bias) if bias or rank else None


def adapted_layers(model: Any, anchor: int) -> Iterator[tuple[int, nn.Module, nn.Module, str]]:
    """(block, layer, the module that owns it, its name there) of what PST adapts in the blocks of an anchor that are loaded."""
    family = model.families[anchor]
    for index, (block, part) in enumerate(zip(model.blocks(anchor), model.space.anchors[anchor].blocks)):
        if not isinstance(block, nn.Identity):
            owner = family.adapted(block)
            for name, *_ in part.adapted:
                yield index, owner.get_submodule(name), owner, name


def merged_weight(layer: nn.Module, factors: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The weight of a layer with its LoRA, and further factors (down, up), added in float32 and rounded to its own dtype."""
    base = getattr(layer, "base_layer", layer)
    weight = base.weight
    changes = [] if base is layer else [layer.get_delta_weight(_ADAPTER)]
    if factors is not None:
        changes.append(factors[1] @ factors[0])
    if not changes:
        return weight
    return sum((c.detach().to(weight.device).float() for c in changes), weight.detach().float()).to(weight.dtype)


def _put(owner: nn.Module, name: str, layer: nn.Module, weight: Tensor) -> None:
    """A plain layer of this weight in the place of one with LoRA around it, the hooks of the latter kept."""
    base = getattr(layer, "base_layer", layer)
    if weight is not base.weight:
        base.weight = nn.Parameter(weight, requires_grad=False)
    if base is not layer:
        for hook in layer._forward_hooks.values():
            base.register_forward_hook(hook)
        owner.set_submodule(name, base)
