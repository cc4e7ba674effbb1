"""Configuration of stitched decoders of LLaMA blocks."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub.dataclasses import strict

from ..configuration import StitchedConfig


@strict
class StitchedLlamaConfig(StitchedConfig):
    """Configuration of `StitchedLlamaForCausalLM`; see `StitchedConfig` for its own fields.

    The remaining fields describe the stitched model to Transformers' caches and generation. They follow from the
    anchors: `num_hidden_layers` is the deepest route, `vocab_size` what they have in common, widths and heads are the largest
    anchor's.
    """

    model_type = "stitched_llama"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    @classmethod
    def from_anchor_configs(cls, configs: Sequence[Any], **options: Any):
        """As `StitchedConfig` has it; the special tokens are the largest anchor's until others are set."""
        config = super().from_anchor_configs(configs, **options)
        largest = config.anchor_config(-1)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, name, getattr(largest, name, None))
        return config

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        if self.anchor_configs:
            self._describe_to_transformers()

    def _describe_to_transformers(self) -> None:
        space = self.stitch_space()
        largest = self.anchor_config(-1)
        self.num_hidden_layers = max(stitch.depth for stitch in space)
        self.vocab_size = min(spec.contract["vocab_size"] for spec in space.anchors)  # further rows are padding
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"):
            setattr(self, name, getattr(largest, name))
        self.head_dim = getattr(largest, "head_dim", None) or largest.hidden_size // largest.num_attention_heads
        lengths = [self.anchor_config(i).max_position_embeddings for i in range(len(self.anchor_configs))]
        self.max_position_embeddings = min(lengths)
