"""Stitched ConvNeXt."""

from .configuration_stitched_convnext import StitchedConvNextConfig
from .modeling_stitched_convnext import StitchedConvNextForImageClassification

__all__ = ["StitchedConvNextConfig", "StitchedConvNextForImageClassification"]
