"""Stitched DINOv2."""

from ..images import StitchedForImageClassification
from .configuration_stitched_dinov2 import StitchedDinov2Config


class StitchedDinov2ForImageClassification(StitchedForImageClassification):
    """Every size between two or more frozen DINOv2 classifiers; see `StitchedForImageClassification`."""

    config_class = StitchedDinov2Config
