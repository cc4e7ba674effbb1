"""A small LLaMA cut out of a large one: the blocks, heads, units and residual channels that carry most.

Cutting keeps the two anchors in one family: the small one starts with features of the large one, and the
feature alignment of `make_anchors.py` keeps them linearly predictable from each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def strongest(scores: Tensor, count: int) -> Tensor:
    """The positions of the `count` largest scores, ascending."""
    return scores.topk(count).indices.sort().values


def kept_blocks(large_depth: int, small_depth: int) -> list[int]:
    """For each block of the small anchor the last block of the large one at its depth, by the nearest-depth map.

    What leaves a small block then starts as what leaves a large block that a junction at this depth replaces.
    """
    depth = {large * small_depth // large_depth: large for large in range(large_depth)}  # the last of each wins
    return [depth[small] for small in range(small_depth)]


@torch.no_grad()
def channel_energy(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Mean square of each residual channel, every depth counted alike."""  # [width]
    states = model.model(tokens, output_hidden_states=True).hidden_states[:-1]
    energies = [state.square().mean((0, 1)) for state in states]
    return torch.stack([energy / energy.sum() for energy in energies]).sum(0)


def spread(groups: Tensor, size: int) -> Tensor:
    """The rows that belong to the chosen groups of `size` neighbouring rows."""
    return (groups[:, None] * size + torch.arange(size)).flatten()


@torch.no_grad()
def prune(large: LlamaForCausalLM, small_config: LlamaConfig, tokens: Tensor) -> tuple[LlamaForCausalLM, Tensor]:
    """A new model of `small_config` with the strongest parts of `large`, and the channels it kept.

    Heads go by whole key-value groups, so the head size and the query heads per key-value head must be equal
    in both (ValueError otherwise). `tokens` [batch, length] are what the energies are measured on.
    """
    config = large.config
    group_size = config.num_attention_heads // config.num_key_value_heads
    small_group_size = small_config.num_attention_heads // small_config.num_key_value_heads
    if (config.head_dim, group_size) != (small_config.head_dim, small_group_size):
        raise ValueError(
            f"head size and query heads per key-value head are {config.head_dim}, {group_size} in the large "
            f"model and {small_config.head_dim}, {small_group_size} in the small one: make them equal"
        )
    channels = strongest(channel_energy(large, tokens), small_config.hidden_size)
    small = LlamaForCausalLM(small_config)
    take(small.model.embed_tokens, large.model.embed_tokens, columns=channels)
    take(small.lm_head, large.lm_head, columns=channels)
    small.model.norm.weight.copy_(large.model.norm.weight[channels])
    blocks = kept_blocks(config.num_hidden_layers, small_config.num_hidden_layers)
    for target, source in zip(small.model.layers, (large.model.layers[i] for i in blocks), strict=True):
        target.input_layernorm.weight.copy_(source.input_layernorm.weight[channels])
        target.post_attention_layernorm.weight.copy_(source.post_attention_layernorm.weight[channels])
        prune_attention(target.self_attn, source.self_attn, channels, small_config, group_size)
        prune_feed_forward(target.mlp, source.mlp, channels)
    return small, channels


def prune_attention(
    target: torch.nn.Module, source: torch.nn.Module, channels: Tensor, small_config: LlamaConfig, group_size: int
) -> None:
    """Keep the key-value groups whose output weights are largest."""
    group_rows = group_size * small_config.head_dim
    norms = source.o_proj.weight.square().sum(0).view(-1, group_rows).sum(1)  # [groups]
    groups = strongest(norms, small_config.num_key_value_heads)
    take(target.q_proj, source.q_proj, spread(groups, group_rows), channels)
    take(target.k_proj, source.k_proj, spread(groups, small_config.head_dim), channels)
    take(target.v_proj, source.v_proj, spread(groups, small_config.head_dim), channels)
    take(target.o_proj, source.o_proj, channels, spread(groups, group_rows))


def prune_feed_forward(target: torch.nn.Module, source: torch.nn.Module, channels: Tensor) -> None:
    """Keep the units whose gate, up and down weights are largest."""
    norms = (
        source.gate_proj.weight.norm(dim=1) * source.up_proj.weight.norm(dim=1) * source.down_proj.weight.norm(dim=0)
    )
    units = strongest(norms, target.gate_proj.out_features)
    take(target.gate_proj, source.gate_proj, units, channels)
    take(target.up_proj, source.up_proj, units, channels)
    take(target.down_proj, source.down_proj, channels, units)


def take(
    target: torch.nn.Module,
    source: torch.nn.Module,
    rows: Tensor | Sequence[int] | None = None,
    columns: Tensor | Sequence[int] | None = None,
) -> None:
    """Copy the chosen rows and columns of a weight; None takes all."""
    weight = source.weight if rows is None else source.weight[rows]
    target.weight.copy_(weight if columns is None else weight[:, columns])
