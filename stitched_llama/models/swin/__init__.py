"""Stitched Swin."""

from .configuration_stitched_swin import StitchedSwinConfig
from .modeling_stitched_swin import StitchedSwinForImageClassification

__all__ = ["StitchedSwinConfig", "StitchedSwinForImageClassification"]
