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
    "baseline": ("lora_baseline", "fine-tune each LLaMA anchor alone by plain LoRA, as a baseline"),
    "baseline-vision": ("vision_baseline", "fine-tune each image classifier alone, as a baseline"),
}


_POSITIONAL = {"shrink": ("--large", "--output_dir")}  # options that may be given by position, in this order
_ALIASES = {"shrink": {"--steps": "--max_steps"}}


def spelled_out(command: str, arguments: Sequence[str]) -> list[str]:
    """The arguments of a recipe, positional ones and aliases replaced by option names."""
    arguments, found = list(arguments), []
    for name in _POSITIONAL.get(command, ()):
        if not arguments or arguments[0].startswith("-"):
            break
        found += [name, arguments.pop(0)]
    return found + [_ALIASES.get(command, {}).get(argument, argument) for argument in arguments]


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Lists the recipes in `--help`; the arguments of a recipe are parsed by the recipe."""
    for command, (_, does) in RECIPES.items():
        commands.add_parser(command, help=does, add_help=False)


def run(command: str, arguments: Sequence[str]) -> int:
    """Runs a recipe as `python -m` would.

    Raises:
        ValueError: invalid arguments or data.
    """
    before, sys.argv = sys.argv, [command, *spelled_out(command, arguments)]
    try:
        runpy.run_module(f"stitched_llama.recipes.{RECIPES[command][0]}", run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
    return 0


def is_refusal(error: BaseException) -> bool:
    """Whether this package raised the error, with a message for the user, and not a library during a run."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return name == "__main__" or name.split(".")[0] == "stitched_llama"
