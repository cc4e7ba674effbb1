"""One route through decoders of LLaMA blocks as a plain model of Transformers: its blocks in a row, LoRA merged, biases in the layers."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stitched_llama.anchors import LlamaFamily
from stitched_llama.pst import biases_of
from stitched_llama.space import Stitch

from .merging import merged_weight

_SAME = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "rope_parameters",
)  # fmt: skip
_KEPT = ("initializer_range", "attention_dropout")
_ANY_LENGTH = ("default", "linear", "llama3")  # position embeddings that do not depend on max_position_embeddings


def plain_obstacle(model: Any, stitch: Stitch) -> str | None:
    """Why a stitch is no plain model; None where it is one."""
    anchors = [segment.anchor for segment in stitch.segments]
    others = [model.space.anchors[a].family for a in anchors if not isinstance(model.families[a], LlamaFamily)]
    if others:
        return f"a {others[0]} is exported as a stitched model alone"
    for junction in stitch.junctions:
        if junction.layer is not None:
            return (
                f"a stitching layer joins block {junction.head_stop - 1} of anchor {junction.head} to block {junction.tail_start} of "
                f"anchor {junction.tail}, which no plain model has (only adapter='identity' does without)"
            )
    kinds = {model.space.anchors[a].family for a in anchors}
    if "qwen3" in kinds and len(kinds) > 1:
        return f"its blocks are of {' and '.join(sorted(kinds))}, and those of qwen3 have norms that the others lack"
    for other in anchors[1:]:
        ours, theirs = _fields(model, anchors[0]), _fields(model, other)
        for name in ours:
            if ours[name] != theirs[name]:
                return f"{name} is {ours[name]} in anchor {anchors[0]} and {theirs[name]} in anchor {other}, a plain model has one"
    return None


def plain_model(model: Any, stitch: Stitch) -> PreTrainedModel:
    """The plain model, which shares the weights that nothing was merged into; for saving, not for running."""
    tensors = _tensors(model, stitch)
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    tied = embedding.data_ptr() == head.data_ptr() and embedding.shape == head.shape
    config = _config(model, stitch, tied)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    dtype = tensors["model.norm.weight"].dtype
    rows = config.vocab_size  # further ones are padding
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if len(tensors[name]) > rows:
            tensors[name] = tensors[name][:rows].clone()
    for name, wanted in plain.state_dict().items():
        if name not in tensors and name.endswith(".bias"):  # of an anchor without, beside one that has it
            tensors[name] = torch.zeros(wanted.shape, dtype=dtype)
    plain.load_state_dict(tensors, assign=True)
    plain.tie_weights()
    plain.config.dtype = dtype
    return plain


def _fields(model: Any, anchor: int) -> dict[str, Any]:
    """What the blocks of a plain model have in common."""
    config = model.anchors[anchor].config
    fields = {name: getattr(config, name, None) for name in _SAME}
    fields["head_dim"] = fields["head_dim"] or config.hidden_size // config.num_attention_heads
    if (config.rope_parameters or {}).get("rope_type", "default") not in _ANY_LENGTH:
        fields["max_position_embeddings"] = config.max_position_embeddings
    return fields | {"dtype": next((p.dtype for p in model.anchors[anchor].parameters()), None)}


def _config(model: Any, stitch: Stitch, tied: bool) -> Any:
    biased = biases_of(stitch, model.stitch_bias) is not None
    anchors = [segment.anchor for segment in stitch.segments]
    configs = [model.anchors[a].config for a in anchors]
    kinds = {model.space.anchors[a].family for a in anchors}
    kind = kinds.pop() if len(kinds) == 1 else "llama"
    if biased and kind in ("mistral", "qwen2"):  # whose o_proj, or all four, have no bias
        kind = "llama"
    shape = {name: value for name, value in _fields(model, anchors[-1]).items() if name != "dtype"}
    fields = shape | {name: getattr(configs[-1], name) for name in _KEPT}
    fields |= {
        name: getattr(model.config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id", "vocab_size")
    }
    fields["max_position_embeddings"] = min(config.max_position_embeddings for config in configs)
    if kind in ("llama", "qwen3"):
        fields["attention_bias"] = biased or any(
            config.model_type == "qwen2" or getattr(config, "attention_bias", False) for config in configs
        )
    if kind == "llama":
        fields["mlp_bias"] = any(getattr(config, "mlp_bias", False) for config in configs)
    if kind == "mistral":
        fields["sliding_window"] = None
    return AutoConfig.for_model(kind, num_hidden_layers=stitch.depth, tie_word_embeddings=tied, **fields)


@torch.no_grad()
def _tensors(model: Any, stitch: Stitch) -> dict[str, Tensor]:
    """The weights of the route, by the names of a plain model."""
    first, last = (model.anchors[stitch.segments[end].anchor] for end in (0, -1))
    found = {
        "model.embed_tokens.weight": first.get_input_embeddings().weight,
        "model.norm.weight": last.model.norm.weight,
        "lm_head.weight": last.get_output_embeddings().weight,
    }
    lora = None if stitch.is_anchor else model.stitch_lora
    biases = biases_of(stitch, model.stitch_bias)
    for slot, (anchor, index) in enumerate(stitch.blocks()):
        block = model.blocks(anchor)[index]
        names = [name for name, *_ in model.space.anchors[anchor].blocks[index].adapted]
        for name, tensor in block.named_parameters():
            if name.split(".")[1] not in names:
                found[f"model.layers.{slot}.{name}"] = tensor
        for number, name in enumerate(names):
            layer = model.families[anchor].adapted(block).get_submodule(name)
            weight = merged_weight(layer, lora and lora.factors(anchor, index, name))
            bias = getattr(layer, "base_layer", layer).bias
            if biases is not None:
                more = biases[slot][number].to(weight.device)
                bias = (more if bias is None else bias.float() + more).to(weight.dtype)
            found[f"model.layers.{slot}.self_attn.{name}.weight"] = weight
            if bias is not None:
                found[f"model.layers.{slot}.self_attn.{name}.bias"] = bias
    return {name: tensor.detach() for name, tensor in found.items()}
