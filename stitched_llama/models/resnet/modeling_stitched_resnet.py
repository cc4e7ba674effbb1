"""Stitched ResNet."""

from ..images import StitchedForImageClassification
from .configuration_stitched_resnet import StitchedResNetConfig


class StitchedResNetForImageClassification(StitchedForImageClassification):
    """Every size between two or more frozen ResNet classifiers; see `StitchedForImageClassification`."""

    config_class = StitchedResNetConfig
