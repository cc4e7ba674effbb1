"""Configuration of stitched ResNet."""

from huggingface_hub.dataclasses import strict

from ..images import StitchedImageConfig


@strict
class StitchedResNetConfig(StitchedImageConfig):
    """Configuration of `StitchedResNetForImageClassification`; see `StitchedImageConfig`."""

    model_type = "stitched_resnet"
