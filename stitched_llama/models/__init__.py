"""Hugging Face names: configurations and models, registered with the Auto classes on import.

configuration   what every stitched configuration holds
modeling_base   what every stitched model is
route           the one route walk
calibration     least squares for all stitching layers in one pass
loading         anchors by reference, whole or only a route's blocks
storage         from_anchors, from_pretrained, save_pretrained, push_to_hub
card            the model card of a bundle
llama           decoders of LLaMA blocks
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .calibration import Calibration
from .configuration import StitchedConfig
from .llama import StitchedLlamaConfig, StitchedLlamaForCausalLM
from .modeling_base import StitchedPreTrainedModel

AutoConfig.register("stitched_llama", StitchedLlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(StitchedLlamaConfig, StitchedLlamaForCausalLM, exist_ok=True)

__all__ = [
    "Calibration",
    "StitchedConfig",
    "StitchedLlamaConfig",
    "StitchedLlamaForCausalLM",
    "StitchedPreTrainedModel",
]
