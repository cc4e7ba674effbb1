"""Which tensors a bundle holds of a model, and their way in and out."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from stitched_llama.bundles import Bundle, check_finite, dequantize_rows, quantize_rows
from stitched_llama.pst import is_low_rank
from stitched_llama.space import Stitch

from .measured import MeasuredTable
from .merging import merged_weight
from .whole import anchor_tensors

_SHARED = ("model.embed_tokens.weight", "lm_head.weight")  # what `share_embedding` makes one tensor of two anchors


class BundleTensors(MeasuredTable):
    """`load_bundle` of stitched models, and what `save_pretrained` writes."""

    anchors: Any
    space: Any
    config: Any
    keys: list[str]

    @property
    def is_whole(self) -> bool:
        """Whether there are no anchors to name, so that a bundle holds their weights."""
        return not self.config.anchors

    def note_dtypes(self, config: Any) -> None:
        """Sets the dtype of each anchor in a configuration to the one that its weights have here."""
        for own, anchor in zip(config.anchor_configs, self.anchors):
            for parameter in islice(anchor.parameters(), 1):  # none of an anchor that no route needs
                own["dtype"] = str(parameter.dtype).removeprefix("torch.")

    def load_bundle(self, bundle: Bundle) -> None:
        """Copies a bundle's tensors into this model: every one this model has, no more, no less than it has. Weights of anchors that
        a bundle holds are there already.

        Raises:
            ValueError: a tensor is missing, has another shape, is not finite, or is of no use here.
        """
        own = self._own_tensors(self.keys)
        heads = tuple(self.trained_heads(range(len(self.anchors))))
        if self.config.pst is None and heads and not any(name.startswith(heads) for name in bundle.shapes):
            own = {
                name: tensor for name, tensor in own.items() if not name.startswith(heads)
            }  # they are the anchors' own
        own = {self._saved_name(name, bundle): tensor for name, tensor in own.items()}
        names = list(own)
        int8 = [n for n in names if _is_stitching_weight(n)] if bundle.config.get("stitching_dtype") == "int8" else []
        scales = {f"{name}_scale": own[name].shape[:1] for name in int8}
        for name in names:
            if name in bundle.shapes and bundle.shapes[name] != tuple(own[name].shape):
                raise ValueError(
                    f"tensor {name} of {bundle.folder} has shape {list(bundle.shapes[name])}, "
                    f"this model needs {list(own[name].shape)}"
                )
        self._check_all_used(bundle, {*names, *scales, *self._saved_tensors(self.keys)})
        tensors = bundle.load_tensors([*names, *scales])
        for name, shape in scales.items():
            if tensors[name].shape != shape:
                raise ValueError(
                    f"tensor {name} of {bundle.folder} has shape {list(tensors[name].shape)}, this model needs {list(shape)}"
                )
        for name in names:
            if tensors[name].is_floating_point() == (name in int8):
                raise ValueError(
                    f"tensor {name} of {bundle.folder} is {tensors[name].dtype} and stitching_dtype is "
                    f"{bundle.config.get('stitching_dtype')!r}: the bundle was changed, save or download it again"
                )
        _fill(own, tensors)

    def _saved_name(self, name: str, bundle: Bundle) -> str:
        """A tensor's name in a bundle that was saved of more anchors: what a shrunk one shares lies there under its name."""
        part, _, rest = name.partition(".")
        index, _, rest = rest.partition(".")
        if name in bundle.shapes or part != "anchors" or rest not in _SHARED:
            return name
        others = (f"anchors.{i}.{rest}" for i, spec in enumerate(self.space.anchors) if str(spec.shared_with) == index)
        return next((other for other in others if other in bundle.shapes), name)

    def _check_all_used(self, bundle: Bundle, used: set[str]) -> None:
        """Refuses tensors that no stitch of the bundle has; a model of one size leaves those of others."""
        saved = bundle.config.get("keys")
        whole = set(self.keys) >= (set(saved) if isinstance(saved, list) else {stitch.key for stitch in self.space})
        unused = [name for name in bundle.shapes if name not in used and (whole or not self._is_of_another(name))]
        if unused:
            raise ValueError(
                f"{bundle.folder} holds {len(unused)} tensors that its config.json has no place for, the first is "
                f"{unused[0]}: one of the two was changed, save or download the bundle again"
            )

    def _is_of_another(self, name: str) -> bool:
        """Whether a tensor may belong to a stitch of the space that this model does not hold, and to none that it holds."""
        part, _, rest = name.partition(".")
        routes = [self.space[key] for key in self.keys]
        if part == "stitching_layers":
            own = {layer for stitch in routes for layer in stitch.layers}
            return rest.split(".")[0] in self.space.stitching_layers.keys() - own
        if part == "stitch_lora":
            own = (
                {layer for block in self.stitch_lora.layers.values() for layer in block} if self.stitch_lora else set()
            )
            others = {f"{a}_{b}" for s in self.space if not s.is_anchor for a, b in s.blocks()}
            layer = rest.split(".")[-1]
            return layer not in own and "_".join(layer.split("_")[:2]) in others
        if part == "stitch_bias":
            return rest in {stitch.key for stitch in self.space} - set(self.keys)
        own_blocks = tuple(self.block_prefix(*block) for stitch in routes for block in stitch.blocks())
        known = rest.split(".")[0] in map(str, range(len(self.space.anchors)))
        return part == "anchors" and known and not name.startswith(own_blocks)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Same as `nn.Module.load_state_dict`; the tensors of a checkpoint, which have the names of a bundle, are loaded as well, as any
        `Trainer` does.

        Raises:
            RuntimeError: `strict` and a name is missing, or a name is unknown.
            ValueError: a tensor of a checkpoint is not finite.
        """
        own = self._saved_tensors(self.keys)
        unknown = set(state_dict) - {*own, *(f"{name}_scale" for name in own)}
        if not state_dict or unknown:
            if set(state_dict) & (own.keys() - self.state_dict().keys()):  # by names that only a bundle has
                raise RuntimeError(
                    f"the bundle's tensors hold {len(unknown)} that this model has no place for, the first is {min(unknown)}: "
                    "they are of another model, or were changed"
                )
            return super().load_state_dict(state_dict, strict, assign)
        check_finite(state_dict, "the checkpoint")
        missing = [name for name in own if name not in state_dict]
        if strict and missing:
            raise RuntimeError(f"the bundle's tensors lack {len(missing)} of {len(own)}, the first is {missing[0]}")
        _fill({name: tensor for name, tensor in own.items() if name in state_dict}, state_dict)
        return _IncompatibleKeys(missing, [])

    def _saved_tensors(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """What a bundle holds of this model, by the name it has there."""
        inside = anchor_tensors(self, [self.space[key] for key in keys]) if self.is_whole else {}
        return {bundle_name(name): tensor for name, tensor in inside.items()} | self._own_tensors(keys)

    def _own_tensors(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """What a bundle holds of this model beside the weights of its anchors."""
        routes = [self.space[key] for key in keys]
        layers = {layer for stitch in routes for layer in stitch.layers}
        blocks = tuple(self.block_prefix(*block) for block in {b for stitch in routes for b in stitch.blocks()})
        heads = tuple(self.trained_heads({stitch.segments[-1].anchor for stitch in routes}))
        own = {}
        for name, tensor in self.named_parameters():
            head, *rest = name.split(".")
            if head == "stitching_layers" and rest[0] in layers:
                keep = True
            elif head == "stitch_lora":
                keep = self._is_stitch_lora(name, *routes)
            elif head == "stitch_bias":
                keep = ".".join(rest[1:]) in keys
            elif head == "anchors" and is_low_rank(name):
                keep = name.startswith(blocks)
            else:
                keep = (name.startswith(heads) and tensor.is_floating_point()) or self._trains_whole(
                    name, routes, blocks
                )
            if keep:
                own[bundle_name(name)] = tensor
        for name, tensor in self.stitching_layers.named_buffers():  # running statistics of an adapter's norms
            if name.split(".")[0] in layers and name.endswith(("running_mean", "running_var")):
                own[f"stitching_layers.{name}"] = tensor
        return own

    def _trains_whole(self, name: str, routes: Sequence[Stitch], blocks: tuple[str, ...]) -> bool:
        """Whether a tensor of an anchor lies on a route of a model whose anchors train whole: a block of it, or what the
        anchor has outside its blocks."""
        if self.config.pst is None or not self.config.pst_config.full or not name.startswith("anchors."):
            return False
        anchor = int(name.split(".")[1])
        if name.startswith(tuple(self.block_prefix(anchor, i) for i in range(self.space.anchors[anchor].depth))):
            return name.startswith(blocks)
        homes = {anchor, self.space.anchors[anchor].shared_with if name.split(".", 2)[2] in _SHARED else None}
        return any(segment.anchor in homes for stitch in routes for segment in stitch.segments)

    @torch.no_grad()
    def _bundle_tensors(
        self, keys: Sequence[str], stitching_dtype: str | None, for_inference: bool = False
    ) -> dict[str, Tensor]:
        tensors = self._saved_tensors(keys)
        if for_inference:
            tensors = self._merged_and_rounded(tensors, self._own_tensors(keys))
        if stitching_dtype == "int8":
            for name in [name for name in tensors if _is_stitching_weight(name)]:
                weight, tensors[f"{name}_scale"] = quantize_rows(tensors[name].detach().flatten(1))
                tensors[name] = weight.view_as(tensors[name])
        return tensors

    def _merged_and_rounded(self, tensors: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
        """What a bundle for inference holds: stitching layers without low-rank updates, what trained in bfloat16."""
        kept = {n: t for n, t in tensors.items() if not (n.startswith("stitching_layers.") and is_low_rank(n))}
        merged = {f"stitching_layers.{name}.proj.weight": layer.proj for name, layer in self.stitching_layers.items()}
        kept |= {name: merged_weight(proj) for name, proj in merged.items() if name in kept}
        rounded = {name for name in own if not name.endswith(("running_mean", "running_var"))}
        return {name: tensor.bfloat16() if name in rounded else tensor for name, tensor in kept.items()}


@torch.no_grad()
def _fill(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors by name; one with a scale is in int8."""
    for name, tensor in own.items():
        saved = tensors[name]
        if f"{name}_scale" in tensors:
            saved = dequantize_rows(saved.flatten(1), tensors[f"{name}_scale"]).view_as(tensor)
        tensor.copy_(saved)


def _is_stitching_weight(name: str) -> bool:
    return name.startswith("stitching_layers.") and name.endswith(".proj.weight")


def bundle_name(name: str) -> str:
    """A tensor's name in a bundle: PEFT's wrapping and this package's containers left out."""
    return name.replace(".base_layer.", ".").replace(".default.", ".").replace("stitch_bias.vectors.", "stitch_bias.")
