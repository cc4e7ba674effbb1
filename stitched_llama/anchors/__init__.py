"""The only code that touches a backbone's inside, and only from outside: one small adapter a family.

base   the contract
llama  decoders made of LLaMA blocks
"""

from .base import Family
from .llama import DecoderContext, LlamaFamily

FAMILIES: dict[str, Family] = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LlamaFamily())

__all__ = ["FAMILIES", "DecoderContext", "Family", "LlamaFamily"]
