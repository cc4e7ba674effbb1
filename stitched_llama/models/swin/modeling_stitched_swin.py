"""Stitched Swin."""

from ..images import StitchedForImageClassification
from .configuration_stitched_swin import StitchedSwinConfig


class StitchedSwinForImageClassification(StitchedForImageClassification):
    """Every size between two or more frozen Swin classifiers; see `StitchedForImageClassification`."""

    config_class = StitchedSwinConfig
