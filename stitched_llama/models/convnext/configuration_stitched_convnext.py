"""Configuration of stitched ConvNeXt."""

from huggingface_hub.dataclasses import strict

from ..images import StitchedImageConfig


@strict
class StitchedConvNextConfig(StitchedImageConfig):
    """Configuration of `StitchedConvNextForImageClassification`; see `StitchedImageConfig`."""

    model_type = "stitched_convnext"
