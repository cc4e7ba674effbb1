"""Stitched decoders of LLaMA blocks: one forward for every size, `generate` with a size or a budget."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from stitched_llama.anchors import DecoderContext
from stitched_llama.pst import updates_of
from stitched_llama.space import Junction, Stitch

from ..modeling_base import NO_BUDGET, BlockOutputs, StitchedPreTrainedModel
from ..route import walk
from ..tokenizers import check_token_ids, check_tokenizers
from .configuration_stitched_llama import StitchedLlamaConfig
from .generation_stitched_llama import StitchedGenerationMixin

_BLOCKS = [LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer]
_ATTENTIONS = [LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention]


def _counted_on_the_route(forward: Callable) -> Callable:
    """Hidden states that are asked for by number, from the end too, are those of the route, however deep others go."""

    @wraps(forward)
    def counted(self, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("output_hidden_states")
        if wanted is not None and not isinstance(wanted, bool):
            states = self._pinned_or(kwargs.get("stitch_id")).depth + 1
            numbers = [wanted] if isinstance(wanted, int) else wanted
            kwargs["output_hidden_states"] = sorted({n % states for n in numbers if -states <= n < states})
        return forward(self, *args, **kwargs)

    return counted


class StitchedLlamaForCausalLM(StitchedPreTrainedModel, StitchedGenerationMixin):
    """Every size between two or more frozen decoders of LLaMA blocks.

    Example:
        >>> model = StitchedLlamaForCausalLM.from_pretrained("me/my-bundle")
        >>> model.generate(**tokenizer("Tell me about alpacas.", return_tensors="pt"), budget="9B")

    Source: ESTA section 5.2.
    """

    config_class = StitchedLlamaConfig
    _no_split_modules = [block.__name__ for block in _BLOCKS]
    _can_record_outputs = {"hidden_states": _BLOCKS, "attentions": _ATTENTIONS}
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _tied_weights_keys = None

    def __init__(self, config: StitchedLlamaConfig, anchors=None):
        super().__init__(config, anchors)
        implementations = {anchor.config._attn_implementation for anchor in self.anchors}
        if len(implementations) > 1:
            raise ValueError(f"anchors run with different attention implementations {sorted(implementations)}: load both with one attn_implementation")  # fmt: skip
        self.config._attn_implementation = implementations.pop()

    def get_input_embeddings(self):
        return self.anchors[self.stitch().segments[0].anchor].get_input_embeddings()

    def get_output_embeddings(self):
        return self.anchors[self.stitch().segments[-1].anchor].get_output_embeddings()

    def set_input_embeddings(self, value):
        """Refused: every anchor has its own.

        Raises:
            ValueError: always, with the way round.
        """
        raise ValueError("every anchor has an embedding of its own: set it by model.anchors[i].set_input_embeddings")

    @can_return_tuple
    @merge_with_config_defaults
    @_counted_on_the_route
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        stitch_id: int | str | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Runs one stitch.

        Args:
            input_ids: [batch, tokens]; or `inputs_embeds` [batch, tokens, width of the first anchor], from the embedding of the
                anchor the route begins in: `model.pinned(stitch_id).get_input_embeddings()`.
            attention_mask: [batch, past + tokens], 1 for tokens to attend to.
            stitch_id: id or key; a key also under `torch.compile`. None takes the default of the configuration.
            labels: [batch, tokens], -100 where no loss is wanted; `shift_labels` beside them, shifted already, take their place.

        Raises:
            ValueError: no such stitch, a token id outside the vocabulary, embeddings of another width, or the cache was made by
                another stitch.
        """
        if "budget" in kwargs:
            raise ValueError(NO_BUDGET)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        stitch = self._pinned_or(stitch_id)
        first, last = stitch.segments[0].anchor, stitch.segments[-1].anchor
        if input_ids is not None and (self.training or labels is not None or input_ids.device.type == "cpu"):
            check_token_ids(
                input_ids, self.config.vocab_size
            )  # on a GPU, where it waits for it, not for each new token
        if inputs_embeds is None:
            inputs_embeds = self.families[first].embed(self.anchors[first], input_ids)
        elif inputs_embeds.shape[-1] != self.space.anchors[first].width:
            raise ValueError(
                f"inputs_embeds are {inputs_embeds.shape[-1]} wide, stitch {stitch.stitch_id} ({stitch.key}) begins in anchor {first} "
                f"of {self.space.anchors[first].width}: embed with model.pinned({stitch.stitch_id}).get_input_embeddings()"
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and not torch.compiler.is_compiling():
            _claim(past_key_values, stitch)
        loss_kwargs = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        context = self._context(
            first,
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            use_cache=bool(use_cache),
            stitch_updates=updates_of(stitch, self.stitch_bias, self.stitch_lora),
            block_kwargs=kwargs,
        )
        specs = self.space.anchors
        hidden = walk(self.families, specs, self.anchors, self.stitching_layers, stitch, inputs_embeds, context)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.families[last].head(self.anchors[last], hidden[:, kept])
        if logits.shape[-1] != self.config.vocab_size:  # padded to more rows than another anchor
            logits = logits[..., : self.config.vocab_size]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        if kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False)):
            # replaces the last one recorded, as in Transformers
            output.last_hidden_state = self.anchors[last].model.norm(hidden)
        return output

    @classmethod
    def check_names(cls, config: StitchedLlamaConfig, names: Sequence[Any], **hub: Any) -> None:
        check_tokenizers(names, [anchor["vocab_size"] for anchor in config.anchor_configs], **hub)

    # ---- what calibration asks

    calibration_inputs = ("input_ids", "attention_mask")

    @torch.no_grad()
    def block_outputs(self, anchor: int, input_ids: Tensor, attention_mask: Tensor | None = None) -> BlockOutputs:
        """Activations of one anchor running alone, no gradients.

        Shapes: input_ids and attention_mask [batch, tokens] -> each [batch, tokens, width].

        Raises:
            ValueError: a token id outside the vocabulary.
        """
        check_token_ids(input_ids, self.config.vocab_size)
        embeds = self.families[anchor].embed(self.anchors[anchor], input_ids)
        return self._block_outputs(anchor, embeds, self._context(anchor, embeds, attention_mask))

    def row_masks(self, batch: dict[str, Tensor], junction: Junction, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, tokens]: tokens that are not padding, and those of them that are not the first of their row."""
        kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        return kept, kept & (kept.cumsum(1) > 1)

    def calibration_loss(self, batch: dict[str, Tensor], key: str) -> tuple[float, int]:
        """Loss of next-token prediction, nats a token, and the tokens it is over; nothing is predicted from padding."""
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        labels = batch["input_ids"].masked_fill(~mask, -100)
        labels[:, 1:].masked_fill_(~mask[:, :-1], -100)
        count = int((labels[:, 1:] != -100).sum())
        loss = float(self(**batch, labels=labels, stitch_id=key, use_cache=False).loss) if count else 0.0
        return loss, count

    def raw_logits(self, batch: dict[str, Tensor], key: str) -> Tensor:
        """[tokens, vocabulary] of the tokens that are not padding."""
        logits = self(**batch, stitch_id=key, use_cache=False).logits
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        return logits[mask.to(logits.device)]

    def _context(
        self,
        anchor: int,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        **fields: Any,
    ) -> DecoderContext:
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(embeds.shape[1], device=embeds.device) + past).unsqueeze(0)
        mask = create_causal_mask(
            config=self.anchors[anchor].config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
        return DecoderContext(mask, position_ids, cache, **fields)


def _claim(cache: Cache, stitch: Stitch) -> None:
    """Marks an empty cache as this stitch's; refuses one that another stitch has filled.

    Raises:
        ValueError: the cache holds another stitch's keys and values.
    """
    owner = getattr(cache, "stitch_key", None)
    if owner != stitch.key:
        if cache.get_seq_length() > 0:
            filled_by = "another model" if owner is None else f"stitch {owner}"
            raise ValueError(
                f"this cache was filled by {filled_by} and cannot be continued by {stitch.key}: "
                "start a new cache when you change the size"
            )
        cache.stitch_key = stitch.key
