"""Stitched ViT and DeiT."""

from .configuration_stitched_vit import StitchedViTConfig
from .modeling_stitched_vit import StitchedViTForImageClassification

__all__ = ["StitchedViTConfig", "StitchedViTForImageClassification"]
