"""Stitched ResNet."""

from .configuration_stitched_resnet import StitchedResNetConfig
from .modeling_stitched_resnet import StitchedResNetForImageClassification

__all__ = ["StitchedResNetConfig", "StitchedResNetForImageClassification"]
