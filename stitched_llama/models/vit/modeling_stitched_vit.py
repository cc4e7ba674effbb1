"""Stitched ViT and DeiT."""

from ..images import StitchedForImageClassification
from .configuration_stitched_vit import StitchedViTConfig


class StitchedViTForImageClassification(StitchedForImageClassification):
    """Every size between two or more frozen ViT and DeiT classifiers; see `StitchedForImageClassification`."""

    config_class = StitchedViTConfig
