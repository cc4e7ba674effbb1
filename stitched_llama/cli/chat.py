"""`stitched-llama chat BUNDLE`: a conversation whose size can be changed at any turn."""

import argparse
import sys
import threading
from collections.abc import Iterator
from typing import Any

from stitched_llama.space import KEYS, Stitch, format_count, printable

PAPER = {"num_beams": 4, "do_sample": True, "top_p": 0.75}  # ESTA section 5.2
HELP = "/size 12B or /size #3 changes the size, /sizes lists them, /reset forgets, /quit leaves"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a bundle at any size",
        description=f"A conversation with a bundle, streamed, at any of its sizes: {HELP}.",
        epilog=KEYS,
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="folder or Hub id of a bundle")
    parser.add_argument("--budget", help="size to start with, such as 9B, 12GB or '8 GMACs' (default: the largest)")
    parser.add_argument("--stitch-id", help="stitch to start with, by id or key, instead of a budget")
    parser.add_argument(
        "--paper", action="store_true", help="the paper's generation: beam 4, top-p 0.75 (no streaming)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--context",
        type=int,
        help="tokens a conversation may grow to, for which a budget of memory must have room too (default: all that the model takes)",
    )
    parser.add_argument("--temperature", type=float, help="sample at this temperature (default, and 0: greedy)")
    parser.add_argument("--top-p", type=float, help="sample from the top candidates of this probability")
    parser.add_argument("--anchors", nargs="+", metavar="ANCHOR", help="where the anchors lie now, small to large")
    parser.add_argument("--no-verify", action="store_true", help="also where the bundle is not what was saved")
    parser.add_argument("--load-in-8bit", action="store_true", help="anchors in 8 bits")
    parser.add_argument("--dtype", default="auto", help="of the anchors")
    parser.add_argument(
        "--device-map", help="as from_pretrained takes it (default: auto where there is a GPU, else cpu)"
    )


class Chat:
    """A conversation with a stitched model.

    Args:
        model, tokenizer: of one bundle; the tokenizer's chat template is the one it was trained with.
        size: to start with: a budget, `#` and a stitch id, or None for the largest that is published.
        context: tokens the conversation may grow to; None is all that the model takes. A budget of memory has room for them.
        settings: passed to `generate`.

    Raises:
        ValueError: the tokenizer has no chat template, no such size, or a context that the model has not.
    """

    def __init__(
        self, model: Any, tokenizer: Any, size: str | None = None, context: int | None = None, **settings: Any
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
        self.messages: list[dict[str, str]] = []
        self.stitch = model.published[-1] if size is None else self.resize(size)

    def resize(self, size: str) -> Stitch:
        """Changes the size from the next answer on: a budget, or `#` and a stitch id.

        Raises:
            ValueError: no such stitch, or a budget that is too small or unreadable; the size stays.
        """
        size = size.strip()
        held = self.context * self.settings.get("num_beams", 1)
        self.stitch = self.model.stitch(size[1:]) if size.startswith("#") else self.model.choose(size, held)
        return self.stitch

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer piece by piece and adds the turn to the conversation.

        Raises:
            ValueError: the conversation leaves no room for an answer; the turn is not added.
        """
        from transformers import TextIteratorStreamer

        messages = [*self.messages, {"role": "user", "content": text}]
        inputs = self._inputs(messages)
        settings = {"stitch_id": self.stitch.stitch_id, **inputs, **self._ending(), **self.settings}
        answer = ""
        if settings.get("num_beams", 1) > 1:
            tokens = self.model.generate(**settings)[0, inputs["input_ids"].shape[1] :]
            answer = self.tokenizer.decode(tokens, skip_special_tokens=True)
            yield answer
        else:
            streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
            failure: list[BaseException] = []

            def work() -> None:
                try:
                    self.model.generate(**settings, streamer=streamer)
                except BaseException as error:  # handed to the reader, who would wait for ever
                    failure.append(error)
                    streamer.end()

            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            for piece in streamer:
                answer += piece
                yield piece
            thread.join()
            if failure:
                raise failure[0]
        self.messages = [*messages, {"role": "assistant", "content": answer.strip()}]

    def _inputs(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The conversation as tokens; its oldest turns are dropped once it no longer fits the context."""
        import torch

        from stitched_llama.training import encode_prompt

        room = self.context - self.settings.get("max_new_tokens", 0)
        while True:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            tokens = encode_prompt(self.tokenizer, text)
            length = len(tokens)
            if length > room and len(messages) == 1:
                raise ValueError(
                    f"the message is {length} tokens long; {self.context} of context less "
                    f"{self.settings.get('max_new_tokens', 0)} for the answer leave {room}: shorten it, or --max-new-tokens"
                )
            if length <= room:
                input_ids = torch.tensor([tokens], device=self.model.device)
                return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
            del messages[:2]

    def _ending(self) -> dict[str, Any]:
        from stitched_llama.training import pad_token_id

        return {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": pad_token_id(self.tokenizer)}


def list_sizes(model: Any, current: Stitch) -> str:
    """The published sizes, the current one marked."""
    lines = []
    for stitch in sorted({*model.published, current}, key=lambda s: s.stitch_id):
        mark = "->" if stitch == current else "  "
        lines.append(f"{mark} {format_count(stitch.params):>7}  stitch {stitch.stitch_id:<3} {stitch.key}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    import torch
    from transformers import AutoTokenizer, BitsAndBytesConfig
    from transformers.utils import logging

    from stitched_llama.models import StitchedLlamaForCausalLM

    logging.disable_progress_bar()
    quantization = BitsAndBytesConfig(load_in_8bit=True) if options.load_in_8bit else None
    model = StitchedLlamaForCausalLM.from_pretrained(
        options.bundle,
        anchors=options.anchors,
        dtype=options.dtype,
        device_map=options.device_map or ("auto" if torch.cuda.is_available() else None),
        quantization_config=quantization,
        verify=not options.no_verify,
    )
    if options.budget is not None and options.stitch_id is not None:
        raise ValueError("--budget and --stitch-id both given: pass one of them")
    size = options.budget if options.stitch_id is None else f"#{options.stitch_id}"
    settings = {"max_new_tokens": options.max_new_tokens, **sampling(options)}
    tokenizer = AutoTokenizer.from_pretrained(options.bundle, trust_remote_code=False)
    chat = Chat(model, tokenizer, size, options.context, **settings)
    stitch = chat.stitch
    print(f"{format_count(stitch.params)} parameters, stitch {stitch.stitch_id} ({stitch.key}); {HELP}")
    converse(chat)
    return 0


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of `generate` for how tokens are chosen; a temperature of 0 is greedy.

    Raises:
        ValueError: settings that exclude each other, or outside their range.
    """
    temperature, top_p = options.temperature, options.top_p
    if options.paper:
        if temperature is not None or top_p is not None:
            raise ValueError("--paper sets beam 4 and top-p 0.75: leave --temperature and --top-p out")
        return dict(PAPER)
    if temperature is not None and temperature < 0:
        raise ValueError(f"--temperature is {temperature}: 0 (greedy) or more is needed")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"--top-p is {top_p}: a share above 0, up to 1, is needed")
    if temperature == 0 or (temperature is None and top_p is None):
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": 1.0 if temperature is None else temperature,
        "top_p": 1.0 if top_p is None else top_p,
    }


def converse(chat: Chat) -> None:
    """Reads lines until the end of input or `/quit`."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        try:
            if not line:
                continue
            if command == "/quit":
                return
            if command == "/sizes":
                print(list_sizes(chat.model, chat.stitch))
            elif command == "/reset":
                chat.messages = []
                print("forgotten")
            elif command == "/size":
                stitch = chat.resize(rest)
                print(f"{format_count(stitch.params)} parameters, stitch {stitch.stitch_id} ({stitch.key})")
            elif command.startswith("/"):
                print(printable(f"unknown command {command}; {HELP}"))
            else:
                for piece in chat.ask(line):
                    print(printable(piece), end="", flush=True)
                print()
        except ValueError as error:
            print(printable(error))
