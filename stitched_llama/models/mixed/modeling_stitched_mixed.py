"""Stitched image classifiers of several families."""

from ..images import StitchedForImageClassification
from .configuration_stitched_mixed import StitchedMixedConfig


class StitchedMixedForImageClassification(StitchedForImageClassification):
    """Every size between frozen classifiers of several families, ResNet to Swin say; see `StitchedForImageClassification`."""

    config_class = StitchedMixedConfig
