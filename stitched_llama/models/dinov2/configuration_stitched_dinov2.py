"""Configuration of stitched DINOv2."""

from huggingface_hub.dataclasses import strict

from ..images import StitchedImageConfig


@strict
class StitchedDinov2Config(StitchedImageConfig):
    """Configuration of `StitchedDinov2ForImageClassification`; see `StitchedImageConfig`."""

    model_type = "stitched_dinov2"
