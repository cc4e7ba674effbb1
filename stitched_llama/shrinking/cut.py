"""Cuts a small model out of a large one: selects blocks, residual channels, attention heads and feed-forward units."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stitched_llama.anchors import FAMILIES, LlamaFamily
from stitched_llama.space import LLAMA_LIKE, block_groups, lineage_of


@dataclass(frozen=True)
class Cut:
    """A small model before distillation.

    Attributes:
        model: the small model, of the large one's class.
        target_blocks: for each block of the small model, the block of the large one whose output it is trained to reproduce.
        channels: [width of the small model], indices of the residual channels kept; None at equal width.
    """

    model: PreTrainedModel
    target_blocks: list[int]
    channels: Tensor | None


def heads_for_width(config: Any, width: int) -> dict[str, int]:
    """Configuration fields of a decoder cut to `width`: as many query heads as fit at the same head size, query heads per
    key-value head and feed-forward ratio unchanged.

    Raises:
        ValueError: `width` is not a multiple of the group of query heads that share a key-value head, or not below the model's.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    if not 0 < width < config.hidden_size:
        raise ValueError(f"width {width} must lie below the {config.hidden_size} of the model that is cut")
    if width % (head_dim * group):
        raise ValueError(
            f"width {width} is not a multiple of {head_dim * group} ({group} query heads of {head_dim} share a key-value head): "
            f"choose one, such as {max(1, width // (head_dim * group)) * head_dim * group}"
        )
    heads = width // head_dim
    units = round(config.intermediate_size * width / config.hidden_size)
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // group,
        "head_dim": head_dim,
        "intermediate_size": units,
    }


@torch.no_grad()
def cut_model(
    large: PreTrainedModel, depth: int, width: int | None = None, batches: Iterable[dict[str, Tensor]] = ()
) -> Cut:
    """A model of `depth` blocks and `width` channels, initialised from weights of `large`.

    The blocks of `large` are split into `depth` groups of neighbours; a block of the small model is initialised from the last block
    of its group, whose output it is trained to reproduce. At equal width all other tensors are copied.

    Args:
        width: of the residual stream, for decoders of LLaMA blocks; None keeps the large model's.
        batches: inputs to measure the energy of the residual channels, needed with `width`.

    Raises:
        ValueError: a depth or width that cannot be cut, or no batches to measure on.
    """
    kind = large.config.model_type
    if kind not in (*LLAMA_LIKE, "vit", "deit", "dinov2"):
        raise ValueError(f"a {kind} cannot be shrunk: decoders of LLaMA blocks, ViT, DeiT and DINOv2 can")
    if width == large.config.hidden_size:
        width = None
    if width is not None and not isinstance(FAMILIES[kind], LlamaFamily):
        raise ValueError(
            f"width {width} is for decoders of LLaMA blocks; a {kind} is shrunk in depth alone: leave it out"
        )
    groups = block_groups(large.config.num_hidden_layers, depth)
    config = copy.deepcopy(large.config)
    config.num_hidden_layers = depth
    for name in ("layer_types", "out_features", "out_indices", "stage_names"):
        if isinstance(getattr(config, name, None), list) and name == "layer_types":
            config.layer_types = [config.layer_types[group[-1]] for group in groups]
    if width is not None:
        for name, value in heads_for_width(large.config, width).items():
            setattr(config, name, value)
    small = type(large)(config).to(large.dtype)
    sources = [group[-1] for group in groups]
    if width is None:
        _copy_blocks(small, large, sources)
        return Cut(small.eval(), sources, None)
    channels = _largest(_channel_energy(large, batches), width)
    _copy_weights(small.model.embed_tokens, large.model.embed_tokens, columns=channels)
    if not config.tie_word_embeddings:
        _copy_weights(small.lm_head, large.lm_head, columns=channels)
    small.model.norm.weight.copy_(large.model.norm.weight[channels])
    for target, source in zip(small.model.layers, (large.model.layers[index] for index in sources)):
        _cut_block(target, source, channels, config)
    return Cut(small.eval(), sources, channels)


def check_lineage(small: PreTrainedModel, cut: Cut, large: PreTrainedModel) -> None:
    """Rejects a small model that was not cut from `large` in the same way as `cut`.

    Raises:
        ValueError: its `shrunk_from` is missing or differs, or its shape does.
    """
    lineage = lineage_of(small.config.to_dict()) or {}
    wanted = {"depth": large.config.num_hidden_layers, "target_blocks": cut.target_blocks}
    for name, value in wanted.items():
        if lineage.get(name) != value:
            raise ValueError(
                f"the small model was not cut in this way: {name} is {lineage.get(name)} in its config, {value} here"
            )
    if small.config.hidden_size != cut.model.config.hidden_size:
        raise ValueError(
            f"the small model is {small.config.hidden_size} wide, {cut.model.config.hidden_size} is asked for"
        )


def _copy_blocks(small: PreTrainedModel, large: PreTrainedModel, sources: Sequence[int]) -> None:
    family = FAMILIES[large.config.model_type]
    names, large_names = family.block_names(small), family.block_names(large)
    own = small.state_dict()
    for name, tensor in large.state_dict().items():
        if not any(name.startswith(f"{block}.") for block in large_names):
            own[name].copy_(tensor)
    for name, source in zip(names, sources):
        small.get_submodule(name).load_state_dict(large.get_submodule(large_names[source]).state_dict())


def _channel_energy(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """[width]: mean share of each residual channel in the squared norm, over all positions and depths."""
    total = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    seen = False
    for batch in batches:
        seen = True
        for state in model.base_model(**batch, output_hidden_states=True, use_cache=False).hidden_states[:-1]:
            share = state.double().square()
            total += (share / share.sum(-1, keepdim=True).clamp_min(1e-12)).mean((0, 1)).cpu()
    if not seen:
        raise ValueError("no data to measure the residual channels on: cutting the width needs batches")
    if not total.isfinite().all():
        raise ValueError(
            "activations of the model that is cut are not finite: its weights are damaged, or load it in float32"
        )
    return total


def _largest(scores: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest scores, ascending."""
    return scores.topk(count).indices.sort().values


def _cut_block(target: nn.Module, source: nn.Module, channels: Tensor, config: Any) -> None:
    """Keeps the key-value groups with the largest output weights and the units with the largest weights."""
    for norm in ("input_layernorm", "post_attention_layernorm"):
        getattr(target, norm).weight.copy_(getattr(source, norm).weight[channels])
    attention, cut = source.self_attn, target.self_attn
    rows = config.head_dim * (
        config.num_attention_heads // config.num_key_value_heads
    )  # query rows of a key-value head
    norms = attention.o_proj.weight[channels].square().sum(0).view(-1, rows).sum(1)
    kept = _largest(norms, config.num_key_value_heads)
    queries, keys = _rows_of(kept, rows), _rows_of(kept, config.head_dim)
    _copy_weights(cut.q_proj, attention.q_proj, queries, channels)
    _copy_weights(cut.k_proj, attention.k_proj, keys, channels)
    _copy_weights(cut.v_proj, attention.v_proj, keys, channels)
    _copy_weights(cut.o_proj, attention.o_proj, channels, queries)
    for norm in ("q_norm", "k_norm"):  # Qwen3's, of each head
        if hasattr(attention, norm):
            getattr(cut, norm).weight.copy_(getattr(attention, norm).weight)
    mlp = source.mlp
    weights = mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
    units = _largest(weights, config.intermediate_size)
    _copy_weights(target.mlp.gate_proj, mlp.gate_proj, units, channels)
    _copy_weights(target.mlp.up_proj, mlp.up_proj, units, channels)
    _copy_weights(target.mlp.down_proj, mlp.down_proj, channels, units)


def _rows_of(groups: Tensor, size: int) -> Tensor:
    """The row indices of the selected groups of `size` neighbouring rows."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _copy_weights(
    target: nn.Module, source: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None
) -> None:
    """Copies the selected rows and columns of a linear layer or embedding; None selects all."""
    weight = source.weight if rows is None else source.weight[rows]
    target.weight.copy_(weight if columns is None else weight[:, columns])
    if getattr(source, "bias", None) is not None:
        target.bias.copy_(source.bias if rows is None else source.bias[rows])
