"""Stitched ConvNeXt."""

from ..images import StitchedForImageClassification
from .configuration_stitched_convnext import StitchedConvNextConfig


class StitchedConvNextForImageClassification(StitchedForImageClassification):
    """Every size between two or more frozen ConvNeXt classifiers; see `StitchedForImageClassification`."""

    config_class = StitchedConvNextConfig
