"""What `generate` does at one size: the size itself, and what Transformers would do without asking for it."""

from typing import Any

from torch import Tensor
from transformers import GenerationMixin


class StitchedGenerationMixin(GenerationMixin):
    """`GenerationMixin` of a stitched decoder."""

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        stitch_id: int | str | None = None,
        budget: Any = None,
        **kwargs: Any,
    ):
        """`GenerationMixin.generate` at one size: by `stitch_id`, by `budget` ("9B", "12GB", "8 GMACs"), or the default.

        `assistant_model` may also be the id or key of a smaller stitch of this model.

        Raises:
            ValueError: both a stitch and a budget are given, the budget is too small, or no such stitch.
        """
        for config in (args[0] if args else None, kwargs.get("generation_config"), self.generation_config):
            if config is not None and (hasattr(config, "stitch_id") or hasattr(config, "budget")):
                raise ValueError(
                    "generation_config holds stitch_id or budget, which Transformers would swallow: remove it there, and "
                    "pass it to generate() or set config.default_stitch_id"
                )
        if stitch_id is not None and budget is not None:
            raise ValueError(f"stitch_id {stitch_id!r} and budget {budget!r} both given: pass one of them")
        if self.pinned_key is not None:
            if budget is not None:
                raise ValueError(
                    f"this view is pinned to {self.pinned_key}, budget {budget!r} cannot be kept: ask the model"
                )
            stitch = self._pinned_or(stitch_id)
        elif budget is not None:
            prompts = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            prompt = next((given for given in prompts if given is not None), None)
            config = args[0] if args else kwargs.get("generation_config")
            stitch = self.choose(budget, self._context_tokens(prompt, config, kwargs))
        else:
            stitch = self.stitch(stitch_id)
        if isinstance(kwargs.get("assistant_model"), (int, str)):
            kwargs["assistant_model"] = self.pinned(kwargs["assistant_model"])
        return super().generate(inputs, *args, stitch_id=stitch.key, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **how: Any
    ) -> None:
        """A cache with as many layers as the route has blocks: offloaded caches fetch the layer after the last."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **how)
        cache = model_kwargs.get("past_key_values")
        if cache is not None and not getattr(cache, "_is_user_defined", False):
            del cache.layers[self._pinned_or(model_kwargs.get("stitch_id")).depth :]

    def _get_static_cache_init_shape(self) -> None:
        """Nothing to allocate ahead: the layers of a route differ in heads, and each is made when it is first filled."""

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """Same as in `GenerationMixin`, but a processor that runs the model itself (`guidance_scale`) runs the stitch of the call."""
        processors = super()._get_logits_processor(*args, **kwargs)
        stitch_id = (kwargs.get("model_kwargs") or {}).get("stitch_id")
        for processor in processors:
            if getattr(processor, "model", None) is self:
                processor.model = self.pinned(self._pinned_or(stitch_id).key)
        return processors

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Same as in `GenerationMixin`, but an assistant, of this model or not, runs its own stitch."""
        own = {name: value for name, value in model_kwargs.items() if name != "stitch_id"}
        return super()._get_candidate_generator(*args, model_kwargs=own, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "continuous batching (generate_batch) knows neither sizes nor the cache slots of a route: use generate"
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def _context_tokens(self, prompt: Tensor | None, config: Any, kwargs: dict[str, Any]) -> int:
        """Tokens the KV cache of a call will hold over all rows, returned sequences and beams."""
        rows, length = prompt.shape[:2] if prompt is not None else (1, 0)
        names = ("max_new_tokens", "max_length", "num_beams", "num_return_sequences")
        said = (kwargs, vars(config or object), vars(self.generation_config))  # what one leaves open the next one says
        wanted = {name: next((by[name] for by in said if by.get(name) is not None), None) for name in names}
        new, beams = wanted["max_new_tokens"], wanted["num_beams"] or 1
        total = length + new if new is not None else max(length, wanted["max_length"] or length + 20)
        copies = beams if beams > 1 else wanted["num_return_sequences"] or 1  # beams return from among themselves
        return rows * copies * total
