"""Decoders made of LLaMA blocks (LLaMA, Mistral, Qwen2, Qwen3), as Transformers builds them.

Shapes: hidden [batch, tokens, width].
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache


@dataclass
class DecoderContext:
    """Inputs that all blocks of a forward share.

    Attributes:
        attention_mask: in the format of the attention implementation; the same for every anchor.
        position_ids: [batch, tokens]; the same in every segment.
        past_key_values: slot i belongs to the i-th block of the route, whichever anchor it is of.
        stitch_updates: for each slot the updates of q, k, v, o (`pst.Update`); None without any.
        block_kwargs: passed on to every block.
    """

    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    past_key_values: Cache | None = None
    use_cache: bool = False
    stitch_updates: Sequence[tuple[Any, ...]] | None = None
    block_kwargs: dict[str, Any] = field(default_factory=dict)


class SlotView:
    """A view of a cache for the blocks of a later segment: their layer index, shifted to their slot in the route."""

    def __init__(self, cache: Cache, shift: int):
        self.cache, self.shift = cache, shift

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        return self.cache.update(key_states, value_states, layer_idx + self.shift, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)


class LlamaFamily:
    """`Family` for a `...ForCausalLM` of LLaMA blocks."""

    layout = "tokens"
    blocks_module = "model.layers"
    embedding_modules = ("model.embed_tokens",)
    head_modules = ("model.norm", "lm_head")

    def auto_class(self) -> type:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def block_names(self, anchor: nn.Module) -> list[str]:
        return [f"{self.blocks_module}.{index}" for index in range(len(anchor.model.layers))]

    def adapted(self, block: nn.Module) -> nn.Module:
        return block.self_attn

    def special_tokens(self, anchor: nn.Module) -> Tensor | None:
        return None

    def embed(self, anchor: nn.Module, inputs: Tensor) -> Tensor:
        table = anchor.model.embed_tokens
        return table(inputs.to(table.weight.device))

    def approach(self, anchor: nn.Module, hidden: Tensor, block: int) -> Tensor:
        return hidden

    def run(
        self, anchor: nn.Module, hidden: Tensor, start: int, stop: int, slot: int, context: DecoderContext
    ) -> Tensor:
        decoder, cache = anchor.model, context.past_key_values
        if cache is not None and slot != start:
            cache = SlotView(cache, slot - start)
        # an earlier segment of the route may be on another device
        inputs = (context.attention_mask, context.position_ids)
        mask, position_ids = (_to_device_of(hidden, value) for value in inputs)
        position_embeddings = decoder.rotary_emb(hidden, position_ids=position_ids)
        for index in range(start, stop):
            updates = context.stitch_updates
            extra = {} if updates is None else {"stitch_updates": updates[slot + index - start]}
            hidden = decoder.layers[index](
                hidden,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=context.use_cache,
                position_embeddings=position_embeddings,
                **extra,
                **context.block_kwargs,
            )
        return hidden

    def head(self, anchor: nn.Module, hidden: Tensor) -> Tensor:
        return anchor.lm_head(anchor.model.norm(hidden))


def _to_device_of(hidden: Tensor, value: Any) -> Any:
    """A mask or positions on the device of `hidden`; None and masks of flex attention are returned unchanged."""
    return value.to(hidden.device) if isinstance(value, Tensor) else value
