"""Models that have no anchors to name, built from a configuration or exported: saved with all their weights, and loaded so."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stitched_llama.anchors import FAMILIES
from stitched_llama.bundles import Bundle
from stitched_llama.pst import is_low_rank, refuse_to_save
from stitched_llama.space import Stitch, StitchSpace

from .loading import IN_PART, Needed, partial_class
from .references import check_placed


def anchor_tensors(model: Any, stitches: Iterable[Stitch]) -> dict[str, Tensor]:
    """The weights of a model's anchors that these routes need, LoRA left out, by their name in the model; one that has several
    names, as where an embedding is tied, has its first."""
    stitches, found, seen = list(stitches), {}, set()
    for index, (anchor, family, spec) in enumerate(zip(model.anchors, model.families, model.space.anchors)):
        unused = tuple(f"{name}." for name in Needed(family, spec, index, stitches).unused(anchor))
        kept = anchor.state_dict().keys()
        buffers = [(name, t) for name, t in anchor.named_buffers() if name in kept and t.is_floating_point()]
        for name, tensor in [*anchor.named_parameters(remove_duplicate=False), *buffers]:
            if not (name.startswith(unused) or is_low_rank(name) or id(tensor) in seen):
                found[f"anchors.{index}.{name}"] = tensor
                seen.add(id(tensor))
    return found


def check_saves_whole(model: Any) -> None:
    """Refuses to save the weights of quantised anchors.

    Raises:
        ValueError: an anchor is quantised.
    """
    if any(getattr(anchor.config, "quantization_config", None) is not None for anchor in model.anchors):
        raise ValueError(
            "the anchors of this model are quantised, and it would be saved with their weights: load it without "
            "quantization_config (dtype='bfloat16'), then save it"
        )


def anchors_inside(
    config: Any, space: StitchSpace, bundle: Bundle, stitches: Iterable[Stitch], load: Mapping[str, Any]
) -> list[PreTrainedModel]:
    """The anchors of a bundle that holds their weights, frozen; only what `stitches` need of them.

    Args:
        load: `dtype`, `quantization_config`, `device_map`, `attn_implementation` and the like, of each anchor.

    Raises:
        ValueError: a tensor is missing, not finite, or has another shape.
    """
    stitches, loaded = list(stitches), []
    for index, spec in enumerate(space.anchors):
        family, own = FAMILIES[spec.family], config.anchor_config(index)
        needed = Needed(family, spec, index, stitches)
        known = family.auto_class()._model_mapping[type(own)]  # of DeiT two, the first has one head
        model_class = partial_class(known[0] if isinstance(known, tuple) else known, needed)
        shares = [other for other, s in enumerate(space.anchors) if other == spec.shared_with or s.shared_with == index]
        with torch.device("meta"):
            skeleton = model_class(own)
        wanted = _shapes(skeleton)
        counts = {name: torch.zeros_like(t, device="cpu") for name, t in skeleton.state_dict().items() if _is_count(t)}
        names = {name: _source(bundle, index, name, shares) for name in wanted}
        if missing := [name for name, source in names.items() if source is None]:
            raise ValueError(
                f"{bundle.folder} names no anchors, so that it holds their weights, and lacks {len(missing)} of {len(names)} tensors of "
                f"anchor {index}, the first is {missing[0]}: the bundle is incomplete, save or download it again"
            )
        for name, source in names.items():
            if bundle.shapes[source] != wanted[name]:
                raise ValueError(
                    f"tensor {source} of {bundle.folder} has shape {list(bundle.shapes[source])}, its config.json makes it "
                    f"{list(wanted[name])}: one of the two was changed"
                )
        tensors = bundle.load_tensors(names.values())
        options = dict(load) if names else {n: v for n, v in load.items() if n != "quantization_config"}
        if options.get("dtype") in (None, "auto"):
            options["dtype"] = getattr(own, "dtype", None) or next((t.dtype for t in tensors.values()), torch.float32)
        model = model_class.from_pretrained(
            None, config=own, state_dict={name: tensors[source] for name, source in names.items()} | counts, **options
        )
        model.__class__ = model_class.__base__  # it was needed to build it; pickle knows this one
        check_placed(f"anchor {index} of {bundle.folder}", model)
        if needed.unused(model):
            refuse_to_save(model, IN_PART)
        loaded.append(model.requires_grad_(False).eval())
    return loaded


def _shapes(skeleton: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Of the weights of a model, each tied one once."""
    tied = skeleton.all_tied_weights_keys
    tensors = skeleton.state_dict().items()
    return {name: tuple(t.shape) for name, t in tensors if name not in tied and not _is_count(t)}


def _is_count(tensor: Tensor) -> bool:
    """Whether it is the count of batches of a norm, which nothing reads."""
    return not tensor.is_floating_point()


def _source(bundle: Bundle, index: int, name: str, shares: Iterable[int]) -> str | None:
    """The name of an anchor's tensor in the bundle; of an embedding or head that anchors share, it may be another anchor's."""
    shares = shares if name.startswith(("model.embed_tokens.", "lm_head.")) else ()
    names = [f"anchors.{anchor}.{name}" for anchor in (index, *shares)]
    return next((name for name in names if name in bundle.shapes), None)
