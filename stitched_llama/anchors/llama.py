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
    """What all blocks of one forward share.

    Attributes:
        attention_mask: as the attention implementation wants it; one mask serves every anchor.
        position_ids: [batch, tokens]; the same in every segment.
        past_key_values: slot i belongs to the i-th block of the route, whichever anchor it is of.
        stitch_updates: for each slot what the stitch adds to q, k, v, o (`pst.Update`); None where it adds nothing.
        block_kwargs: passed on to every block.
    """

    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    past_key_values: Cache | None = None
    use_cache: bool = False
    stitch_updates: Sequence[tuple[Any, ...]] | None = None
    block_kwargs: dict[str, Any] = field(default_factory=dict)


class SlotView:
    """A cache as the blocks of a later segment see it: their own index, shifted to their place in the route."""

    def __init__(self, cache: Cache, shift: int):
        self.cache, self.shift = cache, shift

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        return self.cache.update(key_states, value_states, layer_idx + self.shift, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)


class LlamaFamily:
    """The verbs of `Family` for a `...ForCausalLM` of LLaMA blocks."""

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
        # the head of the route may lie on another device
        mask, position_ids = (_beside(hidden, given) for given in (context.attention_mask, context.position_ids))
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


def _beside(hidden: Tensor, given: Any) -> Any:
    """A mask or positions on the device of the rows; what is no tensor (a mask of flex attention, none) as it is."""
    return given.to(hidden.device) if isinstance(given, Tensor) else given
