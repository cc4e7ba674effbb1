"""What a space needs to know of an anchor: sizes, read from its `config.json`, never from weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """Sizes of one part of an anchor: a block, the embedding or the head.

    Attributes:
        params: all parameters of the part.
        linear_params: those of `params` that a weight quantiser (bitsandbytes) compresses.
        linear_rows: output rows of those linear layers; 8-bit keeps one float32 scale a row.
        macs_per_token: multiply-accumulates a token, without the attention over the context.
        macs_per_context_token: further multiply-accumulates a token for every token attended to.
        kv_width: numbers kept in the KV cache for a token.
        adapted: `(name, in_features, out_features)` of the linear layers that PST adapts.
    """

    params: int
    linear_params: int = 0
    linear_rows: int = 0
    macs_per_token: int = 0
    macs_per_context_token: int = 0
    kv_width: int = 0
    adapted: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class AnchorSpec:
    """The sizes of one anchor.

    Attributes:
        family: name of the block contract (`model_type` of the config).
        width: features of the residual stream.
        vocab_size: rows of the embedding.
        embedding, head: parts before the first and after the last block.
        blocks: one part a block.
        tied: the head's matrix is the embedding's; counted once where one route uses both.
    """

    family: str
    width: int
    vocab_size: int
    embedding: Part
    head: Part
    blocks: tuple[Part, ...]
    tied: bool = False

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def params(self) -> int:
        shared = self.embedding.params if self.tied else 0
        return self.embedding.params + self.head.params - shared + sum(block.params for block in self.blocks)


def llama_spec(config: Mapping[str, Any]) -> AnchorSpec:
    """The spec of a decoder made of LLaMA blocks, from the fields of its `config.json`.

    Covers grouped-query attention, a head size other than `hidden_size / num_attention_heads`, tied embeddings,
    biases, and the per-head norms of Qwen3.

    Raises:
        ValueError: the family is unknown, a field is missing, or the model uses a sliding window.
    """
    family = config.get("model_type", "?")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not built of LLaMA blocks; one of {', '.join(FAMILIES)} is needed")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise ValueError(
            f"{family} uses a sliding window of {config['sliding_window']} tokens; LLaMA blocks attend to all: "
            "choose an anchor without one (sliding_window null)"
        )
    try:
        width, depth, ffn = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
        heads, vocab = config["num_attention_heads"], config["vocab_size"]
    except KeyError as missing:
        raise ValueError(f"the {family} config has no field {missing}") from None
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or width // heads
    q_bias, o_bias, ffn_bias, head_norms = _biases_and_norms(family, config)

    q, kv = heads * head_dim, kv_heads * head_dim
    linears = {
        "q_proj": (width, q, q_bias), "k_proj": (width, kv, q_bias), "v_proj": (width, kv, q_bias),
        "o_proj": (q, width, o_bias), "gate_proj": (width, ffn, ffn_bias), "up_proj": (width, ffn, ffn_bias),
        "down_proj": (ffn, width, ffn_bias),
    }  # fmt: skip
    matrices = sum(d_in * d_out for d_in, d_out, _ in linears.values())
    biases = sum(d_out for _, d_out, bias in linears.values() if bias)
    block = Part(
        params=matrices + biases + 2 * width + (2 * head_dim if head_norms else 0),
        linear_params=matrices,
        linear_rows=sum(d_out for _, d_out, _ in linears.values()),
        macs_per_token=matrices,
        macs_per_context_token=2 * q,  # scores and weighted values
        kv_width=2 * kv,
        adapted=tuple((name, *linears[name][:2]) for name in ADAPTED_LINEARS),
    )
    return AnchorSpec(
        family=family,
        width=width,
        vocab_size=vocab,
        embedding=Part(params=vocab * width),
        head=Part(params=vocab * width + width, macs_per_token=vocab * width),
        blocks=(block,) * depth,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _biases_and_norms(family: str, config: Mapping[str, Any]) -> tuple[bool, bool, bool, bool]:
    """Biases on q/k/v, on o, on the feed-forward, and norms on query and key heads."""
    if family == "qwen2":
        return True, False, False, False
    if family == "qwen3":
        bias = bool(config.get("attention_bias", False))
        return bias, bias, False, True
    if family == "mistral":
        return False, False, False, False
    bias = bool(config.get("attention_bias", False))
    return bias, bias, bool(config.get("mlp_bias", False)), False


ADAPTED_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
FAMILIES = {"llama": llama_spec, "mistral": llama_spec, "qwen2": llama_spec, "qwen3": llama_spec}


def anchor_spec(config: Mapping[str, Any]) -> AnchorSpec:
    """The spec of any supported family (see `FAMILIES`), chosen by `model_type`."""
    return FAMILIES.get(config.get("model_type", "?"), llama_spec)(config)
