"""The spec function of each `model_type`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from .convolutions import convnext_spec, mobilenet_v2_spec, resnet_spec
from .decoders import LLAMA_LIKE, llama_spec
from .fields import family_of
from .lineage import parent_of, shares_embedding
from .spec import AnchorSpec
from .vision_transformers import dinov2_spec, swin_spec, vit_spec

SPEC_FUNCTIONS: dict[str, Callable[..., AnchorSpec]] = dict.fromkeys(LLAMA_LIKE, llama_spec) | {
    "vit": vit_spec,
    "deit": vit_spec,
    "dinov2": dinov2_spec,
    "swin": swin_spec,
    "convnext": convnext_spec,
    "resnet": resnet_spec,
    "mobilenet_v2": mobilenet_v2_spec,
}
ANY_SIZE = ("dinov2", "convnext", "resnet", "mobilenet_v2")  # convolutions only, or interpolated positions
_IMAGE_SIZE = 224


def anchor_spec(config: Mapping[str, Any], image_size: int | Sequence[int] | None = None) -> AnchorSpec:
    """The spec of an anchor of any supported family, selected by `model_type`.

    Args:
        image_size: side of the images, or (height, width); by default that of the config.

    Raises:
        ValueError: the family is unknown or does not run at that size, or a field is missing or impossible.
    """
    family = family_of(config)
    if family not in SPEC_FUNCTIONS:
        raise ValueError(f"model_type {family!r} is not supported; one of {', '.join(SPEC_FUNCTIONS)} is needed")
    if family not in LLAMA_LIKE:
        own = config.get("image_size")
        size = next(value for value in (image_size, own, _IMAGE_SIZE) if value is not None)
        if own is not None and _sides(own) != _sides(size) and family not in ANY_SIZE:
            raise ValueError(
                f"{family} runs at the image_size it was trained at, {own}, and {size} is asked for: leave image_size out, or take "
                f"anchors of {', '.join(ANY_SIZE)}"
            )
        config = {**config, "image_size": size, "trained_size": size if own is None else own}
    spec = SPEC_FUNCTIONS[family](config)
    return spec if spec.unit == "token" else replace(spec, rebuild=partial(_entered_at, config))


def _sides(size: Any) -> list[Any]:
    return list(size) if isinstance(size, (list, tuple)) else [size, size]


def _entered_at(config: Mapping[str, Any], block: int, grid: tuple[int, int]) -> AnchorSpec:
    return SPEC_FUNCTIONS[config["model_type"]](config, (block, grid))


def anchor_specs(
    configs: Sequence[Mapping[str, Any]], image_size: int | Sequence[int] | None = None
) -> list[AnchorSpec]:
    """The specs of the anchors of a space, at one image size; a config without an image size takes that of the others."""
    sizes = [config["image_size"] for config in configs if config.get("image_size")]
    usual = image_size or (sizes[0] if sizes else None)
    specs = [anchor_spec(config, image_size if config.get("image_size") else usual) for config in configs]
    return [
        replace(spec, shared_with=parent_of(config, specs)) if shares_embedding(config) else spec
        for config, spec in zip(configs, specs)
    ]
