"""Which family reads which `config.json`."""

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

FAMILIES: dict[str, Callable[..., AnchorSpec]] = dict.fromkeys(LLAMA_LIKE, llama_spec) | {
    "vit": vit_spec,
    "deit": vit_spec,
    "dinov2": dinov2_spec,
    "swin": swin_spec,
    "convnext": convnext_spec,
    "resnet": resnet_spec,
    "mobilenet_v2": mobilenet_v2_spec,
}
_IMAGE_SIZE = 224


def anchor_spec(config: Mapping[str, Any], image_size: int | None = None) -> AnchorSpec:
    """The spec of any supported family, chosen by `model_type`.

    Args:
        image_size: side of the image, for families whose config does not say it (ResNet).

    Raises:
        ValueError: the family is unknown, or a field is missing or impossible.
    """
    family = family_of(config)
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not supported; one of {', '.join(FAMILIES)} is needed")
    if family not in LLAMA_LIKE and config.get("image_size") is None:
        config = {**config, "image_size": image_size or _IMAGE_SIZE}
    spec = FAMILIES[family](config)
    return spec if spec.unit == "token" else replace(spec, rebuild=partial(_entered_at, config))


def _entered_at(config: Mapping[str, Any], block: int, grid: tuple[int, int]) -> AnchorSpec:
    return FAMILIES[config["model_type"]](config, (block, grid))


def anchor_specs(configs: Sequence[Mapping[str, Any]]) -> list[AnchorSpec]:
    """The specs of anchors that belong together: one that does not say its image size takes the others'."""
    sizes = [config["image_size"] for config in configs if config.get("image_size")]
    specs = [anchor_spec(config, sizes[0] if sizes else None) for config in configs]
    return [
        replace(spec, shared_with=parent_of(config, specs)) if shares_embedding(config) else spec
        for config, spec in zip(configs, specs)
    ]
