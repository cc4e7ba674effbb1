"""The only code that depends on the inside of a backbone: one small class a family.

base      the interface
llama     decoders made of LLaMA blocks
image     base class of the image families
vit, dinov2, swin, convnext, resnet, mobilenet   one image family each
"""

from .base import Family
from .convnext import ConvNextFamily
from .dinov2 import Dinov2Family
from .image import ImageContext
from .llama import DecoderContext, LlamaFamily
from .mobilenet import MobileNetV2Family
from .resnet import ResNetFamily
from .swin import SwinFamily
from .vit import ViTFamily

FAMILIES: dict[str, Family] = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LlamaFamily()) | {
    "vit": ViTFamily(),
    "deit": ViTFamily(),
    "dinov2": Dinov2Family(),
    "swin": SwinFamily(),
    "convnext": ConvNextFamily(),
    "resnet": ResNetFamily(),
    "mobilenet_v2": MobileNetV2Family(),
}

__all__ = ["FAMILIES", "DecoderContext", "Family", "ImageContext", "LlamaFamily"]
