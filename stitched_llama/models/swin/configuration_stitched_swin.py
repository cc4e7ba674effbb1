"""Configuration of stitched Swin."""

from huggingface_hub.dataclasses import strict

from ..images import StitchedImageConfig


@strict
class StitchedSwinConfig(StitchedImageConfig):
    """Configuration of `StitchedSwinForImageClassification`; see `StitchedImageConfig`."""

    model_type = "stitched_swin"
