"""`stitched-llama chat BUNDLE`: a conversation in which the stitch can be changed at any turn."""

import argparse
import contextlib
import sys
from typing import Any

from stitched_llama.space import KEYS, Stitch, first_line, format_count, printable

from .conversation import Chat

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
    parser.add_argument("--max-new-tokens", type=int, default=256, help="maximum tokens of an answer (default 256)")
    parser.add_argument(
        "--context",
        type=int,
        help="maximum tokens of a conversation; a memory budget includes their KV cache (default: the maximum of the model)",
    )
    parser.add_argument("--system", help="a system message before the conversation")
    parser.add_argument("--temperature", type=float, help="sample at this temperature (default, and 0: greedy)")
    parser.add_argument("--top-p", type=float, help="nucleus sampling with this probability")
    parser.add_argument(
        "--anchors", nargs="+", metavar="ANCHOR", help="current paths or Hub ids of the anchors, small to large"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="also if files of the bundle differ from their digests"
    )
    parser.add_argument("--load-in-8bit", action="store_true", help="anchors in 8 bits")
    parser.add_argument("--dtype", default="auto", help="of the anchors")
    parser.add_argument("--device-map", help="device_map of from_pretrained (default: auto with a GPU, else cpu)")


def list_sizes(model: Any, current: Stitch) -> str:
    """The published sizes, the current one marked."""
    lines = []
    for stitch in sorted({*model.published, current}, key=lambda s: s.stitch_id):
        mark = "->" if stitch == current else "  "
        lines.append(f"{mark} {format_count(stitch.params):>7}  stitch {stitch.stitch_id:<3} {stitch.key}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.utils import logging

    from stitched_llama.models import StitchedLlamaForCausalLM
    from stitched_llama.training import load_tokenizer

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
    chat = Chat(model, load_tokenizer(options.bundle), size, options.context, options.system, **settings)
    stitch = chat.stitch
    print(f"{format_count(stitch.params)} parameters, stitch {stitch.stitch_id} ({stitch.key}); {HELP}")
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if hasattr(stream, "reconfigure"):  # an undecodable byte does not end the conversation
            stream.reconfigure(errors=errors)
    converse(chat)
    return 0


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Sampling settings for `generate`; a temperature of 0 means greedy decoding.

    Raises:
        ValueError: settings that exclude each other, or are out of range.
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
    """Reads lines until the end of input or `/quit`; Ctrl-C ends an answer, or between answers the conversation."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            print(f"the line is no UTF-8 text ({error.reason})")
            continue
        command, _, rest = line.partition(" ")
        try:
            if not line:
                continue
            if command == "/quit":
                return
            if command == "/sizes":
                print(list_sizes(chat.model, chat.stitch))
            elif command == "/reset":
                chat.reset()
                print("forgotten")
            elif command == "/size":
                stitch = chat.resize(rest)
                print(f"{format_count(stitch.params)} parameters, stitch {stitch.stitch_id} ({stitch.key})")
            elif command.startswith("/"):
                print(printable(f"unknown command {command}; {HELP}"))
            else:
                _answer(chat, line)
        except ValueError as error:
            print(printable(error))
        except RuntimeError as error:  # for example out of memory: a smaller stitch may work
            print(f"{type(error).__name__}: {printable(first_line(error))}")


def _answer(chat: Chat, line: str) -> None:
    with contextlib.closing(chat.ask(line)) as pieces:
        try:
            for piece in pieces:
                print(printable(piece), end="", flush=True)
        except KeyboardInterrupt:
            print(" [interrupted]", end="")
    print()
