"""Stitched MobileNetV2."""

from ..images import StitchedForImageClassification
from .configuration_stitched_mobilenet_v2 import StitchedMobileNetV2Config


class StitchedMobileNetV2ForImageClassification(StitchedForImageClassification):
    """Every size between two or more frozen MobileNetV2 classifiers; see `StitchedForImageClassification`."""

    config_class = StitchedMobileNetV2Config
