"""Configuration of stitched ViT and DeiT."""

from huggingface_hub.dataclasses import strict

from ..images import StitchedImageConfig


@strict
class StitchedViTConfig(StitchedImageConfig):
    """Configuration of `StitchedViTForImageClassification`; see `StitchedImageConfig`."""

    model_type = "stitched_vit"
