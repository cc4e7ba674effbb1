"""Stitched DINOv2."""

from .configuration_stitched_dinov2 import StitchedDinov2Config
from .modeling_stitched_dinov2 import StitchedDinov2ForImageClassification

__all__ = ["StitchedDinov2Config", "StitchedDinov2ForImageClassification"]
