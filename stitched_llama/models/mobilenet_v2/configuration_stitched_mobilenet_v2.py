"""Configuration of stitched MobileNetV2."""

from huggingface_hub.dataclasses import strict

from ..images import StitchedImageConfig


@strict
class StitchedMobileNetV2Config(StitchedImageConfig):
    """Configuration of `StitchedMobileNetV2ForImageClassification`; see `StitchedImageConfig`."""

    model_type = "stitched_mobilenet_v2"
