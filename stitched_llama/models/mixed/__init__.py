"""Stitched image classifiers of several families."""

from .configuration_stitched_mixed import StitchedMixedConfig
from .modeling_stitched_mixed import StitchedMixedForImageClassification

__all__ = ["StitchedMixedConfig", "StitchedMixedForImageClassification"]
