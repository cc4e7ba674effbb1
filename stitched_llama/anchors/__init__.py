"""The only code that touches a backbone's inside, and only from outside: one small adapter a family.

base      the contract
llama     decoders made of LLaMA blocks
image     what the image families share
vit, swin, convnext, resnet   one image family each
"""

from .base import Family
from .convnext import ConvNextFamily
from .image import ImageContext
from .llama import DecoderContext, LlamaFamily
from .resnet import ResNetFamily
from .swin import SwinFamily
from .vit import ViTFamily

FAMILIES: dict[str, Family] = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LlamaFamily()) | {
    "vit": ViTFamily(),
    "deit": ViTFamily(),
    "swin": SwinFamily(),
    "convnext": ConvNextFamily(),
    "resnet": ResNetFamily(),
}

__all__ = ["FAMILIES", "DecoderContext", "Family", "ImageContext", "LlamaFamily"]
