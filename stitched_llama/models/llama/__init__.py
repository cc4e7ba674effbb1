"""Stitched decoders of LLaMA blocks."""

from .configuration_stitched_llama import StitchedLlamaConfig
from .modeling_stitched_llama import StitchedLlamaForCausalLM

__all__ = ["StitchedLlamaConfig", "StitchedLlamaForCausalLM"]
