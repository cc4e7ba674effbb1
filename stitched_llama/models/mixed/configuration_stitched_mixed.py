"""Configuration of stitched image classifiers of several families."""

from huggingface_hub.dataclasses import strict

from ..images import StitchedImageConfig


@strict
class StitchedMixedConfig(StitchedImageConfig):
    """Configuration of `StitchedMixedForImageClassification`; see `StitchedImageConfig`."""

    model_type = "stitched_mixed"
