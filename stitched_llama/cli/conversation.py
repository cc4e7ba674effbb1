"""A conversation with a stitched model: turns, streaming, context length, interrupts."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from stitched_llama.space import Stitch


class Chat:
    """A conversation with a stitched model.

    Args:
        model, tokenizer: of one bundle; the tokenizer's chat template is the one it was trained with.
        size: the initial stitch: a budget, `#` and a stitch id, or None for the largest published stitch.
        context: maximum tokens of the conversation; None is the maximum of the model. A memory budget includes their KV cache.
        system: a system message before all turns.
        settings: passed to `generate`.

    Raises:
        ValueError: the tokenizer has no chat template, there is no such stitch, or the context exceeds the model's.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        size: str | None = None,
        context: int | None = None,
        system: str | None = None,
        **settings: Any,
    ):
        most = model.config.max_position_embeddings
        if tokenizer.chat_template is None:
            raise ValueError("the bundle's tokenizer has no chat template: save it with tokenizer.chat_template set")
        if context is not None and not 0 < context <= most:
            raise ValueError(f"a context of {context} tokens is asked for: 1 to {most} is what the model takes")
        new, held = settings.get("max_new_tokens", 0), most if context is None else context
        if new >= held:
            raise ValueError(
                f"{new} new tokens leave no room for a message in a context of {held}: ask for fewer, or more context"
            )
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.context = held
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.stitch = model.published[-1] if size is None else self.resize(size)

    def resize(self, size: str) -> Stitch:
        """Selects the stitch of the next answers by a budget, or `#` and a stitch id.

        Raises:
            ValueError: no such stitch, or a budget that is too small or cannot be parsed; the stitch is not changed.
        """
        size = size.strip()
        held = self.context * self.settings.get("num_beams", 1)
        self.stitch = self.model.stitch(size[1:]) if size.startswith("#") else self.model.choose(size, held)
        return self.stitch

    def reset(self) -> None:
        """Removes all turns but the system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer in pieces and adds the turn to the conversation; an interrupted answer is added as far as it was generated.

        Raises:
            ValueError: the conversation cannot be rendered or tokenised, or the context is too short for an answer; no turn is added.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        inputs = self._inputs(messages)
        settings = {"stitch_id": self.stitch.stitch_id, **inputs, **self._ending(), **self.settings}
        answer, keep = "", False
        try:
            for piece in self._whole(settings) if settings.get("num_beams", 1) > 1 else self._stream(settings):
                answer, keep = answer + piece, True
                yield piece
            keep = True
        except Exception:
            keep = False
            raise
        finally:
            if keep:
                self.messages = [*messages, {"role": "assistant", "content": answer.strip()}]

    def _whole(self, settings: dict[str, Any]) -> Iterator[str]:
        tokens = self.model.generate(**settings)[0, settings["input_ids"].shape[1] :]
        yield self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _stream(self, settings: dict[str, Any]) -> Iterator[str]:
        """The pieces of an answer, generated in a thread that is stopped and joined when this generator ends."""
        import torch
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []
        stopped = threading.Event()

        def stop(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full(input_ids.shape[:1], stopped.is_set(), device=input_ids.device)

        def work() -> None:
            try:
                self.model.generate(**settings, streamer=streamer, stopping_criteria=StoppingCriteriaList([stop]))
            except BaseException as error:  # passed to the reader, which would otherwise wait forever
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stopped.set()
            _join(thread)
        if failure:
            raise failure[0]

    def _inputs(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The conversation as tokens; the oldest turns, but not the system message, are dropped if it exceeds the context."""
        import torch

        from stitched_llama.training import encode_prompt, render_chat

        room, vocabulary = self.context - self.settings.get("max_new_tokens", 0), self.model.config.vocab_size
        first = 1 if messages[0]["role"] == "system" else 0
        while True:
            text = render_chat(self.tokenizer, messages)
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError("the message is no UTF-8 text: send it again in UTF-8") from None
            tokens = encode_prompt(self.tokenizer, text)
            if (highest := max(tokens, default=0)) >= vocabulary:
                raise ValueError(
                    f"token {highest} ({self.tokenizer.convert_ids_to_tokens(highest)!r}) is beyond the model's vocabulary of "
                    f"{vocabulary}: leave it out, or save the tokenizer with the bundle that its anchors were trained with"
                )
            length = len(tokens)
            if length > room and len(messages) == first + 1:
                raise ValueError(
                    f"the message is {length} tokens long; {self.context} of context less "
                    f"{self.settings.get('max_new_tokens', 0)} for the answer leave {room}: shorten it, or --max-new-tokens"
                )
            if length <= room:
                input_ids = torch.tensor([tokens], device=self.model.device)
                return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
            del messages[first : first + 2]

    def _ending(self) -> dict[str, Any]:
        from stitched_llama.training import end_ids, pad_token_id

        ends = end_ids(self.tokenizer, self.model.generation_config)
        return {"eos_token_id": ends, "pad_token_id": pad_token_id(self.tokenizer, self.model.config.vocab_size)}


def _join(thread: threading.Thread) -> None:
    """Joins a thread, ignoring Ctrl-C: a thread inside torch aborts the process when Python exits."""
    while thread.is_alive():
        with contextlib.suppress(KeyboardInterrupt):
            thread.join()
