"""Specs of decoders made of LLaMA blocks."""

from collections.abc import Mapping
from typing import Any

from .fields import MOST_BLOCKS, family_of, positive, switch
from .spec import AnchorSpec, Feature, Part

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
_DEFAULTS = {  # Transformers' own, where they are not "as many as heads"
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "use_sliding_window": False},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False},
}
ADAPTED_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama_spec(config: Mapping[str, Any]) -> AnchorSpec:
    """The spec of a decoder made of LLaMA blocks, from the fields of its `config.json`.

    Covers grouped-query attention, a head size other than `hidden_size / num_attention_heads`, tied embeddings,
    biases, and the per-head norms of Qwen3.

    Raises:
        ValueError: the family is unknown, a field is missing, or the model uses a sliding window.
    """
    family = family_of(config)
    if family not in LLAMA_LIKE:
        raise ValueError(
            f"model_type {family!r} is not built of LLaMA blocks; one of {', '.join(LLAMA_LIKE)} is needed"
        )
    config = {**_DEFAULTS.get(family, {}), **config}  # what a sparse config.json leaves out
    if config.get("sliding_window") and switch(config, "use_sliding_window", True):
        raise ValueError(
            f"{family} uses a sliding window of {config['sliding_window']} tokens; LLaMA blocks attend to all: "
            "choose an anchor without one (sliding_window null)"
        )
    width, depth = positive(config, "hidden_size"), positive(config, "num_hidden_layers", most=MOST_BLOCKS)
    ffn, heads, vocab = (positive(config, f) for f in ("intermediate_size", "num_attention_heads", "vocab_size"))
    kv_heads = positive(config, "num_key_value_heads", heads)
    head_dim = positive(config, "head_dim", width // heads)
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
        macs=matrices,
        macs_per_context_token=2 * q,  # scores and weighted values
        kv_width=2 * kv,
        adapted=tuple((name, *linears[name][:2]) for name in ADAPTED_LINEARS),
    )
    return AnchorSpec(
        family=family,
        embedding=Part(params=vocab * width),
        head=Part(params=vocab * width + width, macs=vocab * width),
        blocks=(block,) * depth,
        enters=(Feature(width),) * depth,
        leaves=(Feature(width),) * depth,
        contract={"vocab_size": vocab},
        tied=switch(config, "tie_word_embeddings"),
    )


def _biases_and_norms(family: str, config: Mapping[str, Any]) -> tuple[bool, bool, bool, bool]:
    """Biases on q/k/v, on o, on the feed-forward, and norms on query and key heads."""
    if family == "qwen2":
        return True, False, False, False
    if family == "qwen3":
        bias = switch(config, "attention_bias")
        return bias, bias, False, True
    if family == "mistral":
        return False, False, False, False
    bias = switch(config, "attention_bias")
    return bias, bias, switch(config, "mlp_bias"), False
