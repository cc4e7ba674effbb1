"""`stitched-llama finetune` and the other recipes: run as scripts, in this process."""

import argparse
import runpy
import sys
from collections.abc import Sequence

RECIPES = {  # command -> module of stitched_llama.recipes, what it does
    "finetune": ("finetune_alpaca", "fine-tune every size between LLaMA anchors on instructions, in one run"),
    "finetune-vision": ("finetune_vision", "fine-tune every size between image classifiers, in one run"),
    "shrink": (
        "shrink",
        "cut a small anchor out of a large model, and distil it: shrink LARGE OUT --depth N --data ...",
    ),
    "baseline": ("lora_baseline", "tune each LLaMA anchor alone by plain LoRA, to set beside that run"),
    "baseline-vision": ("vision_baseline", "tune each image classifier alone, to set beside that run"),
}


_POSITIONAL = {"shrink": ("--large", "--output_dir")}  # options that may be given without their name, in this order
_ALIASES = {"shrink": {"--steps": "--max_steps"}}


def spelled_out(command: str, arguments: Sequence[str]) -> list[str]:
    """The arguments of a recipe with the names of those that the command takes by position."""
    arguments, found = list(arguments), []
    for name in _POSITIONAL.get(command, ()):
        if not arguments or arguments[0].startswith("-"):
            break
        found += [name, arguments.pop(0)]
    return found + [_ALIASES.get(command, {}).get(word, word) for word in arguments]


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Lists them; what follows the command is for the recipe's own parser."""
    for command, (_, does) in RECIPES.items():
        commands.add_parser(command, help=does, add_help=False)


def run(command: str, arguments: Sequence[str]) -> int:
    """Runs a recipe as `python -m` would.

    Raises:
        ValueError: what the recipe refuses.
    """
    before, sys.argv = sys.argv, [command, *spelled_out(command, arguments)]
    try:
        runpy.run_module(f"stitched_llama.recipes.{RECIPES[command][0]}", run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
    return 0


def is_refusal(error: BaseException) -> bool:
    """Whether this package raised the error itself, in words for the user, and not a library in the middle of a run."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return name == "__main__" or name.split(".")[0] == "stitched_llama"
