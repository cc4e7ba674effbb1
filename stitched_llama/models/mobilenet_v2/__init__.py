"""Stitched MobileNetV2."""

from .configuration_stitched_mobilenet_v2 import StitchedMobileNetV2Config
from .modeling_stitched_mobilenet_v2 import StitchedMobileNetV2ForImageClassification

__all__ = ["StitchedMobileNetV2Config", "StitchedMobileNetV2ForImageClassification"]
