"""The command `stitched-llama`.

space    list the stitches of anchors and their costs, from config.json alone
bundle   show or verify a bundle
export   write one size with all its weights
chat     talk to a bundle at any size; conversation holds the turns
recipes  finetune, finetune-vision, shrink, baseline, baseline-vision
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from stitched_llama import __version__
from stitched_llama.space import printable

from . import bundle, chat, export, recipes, space


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stitched-llama",
        description="One fine-tune of two or more frozen models, every size between them.",
        epilog="`stitched-llama COMMAND --help` says what a command does and lists its options.",
    )
    parser.add_argument("--version", action="version", version=f"stitched-llama {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    recipes.add_parsers(commands)
    for module in (space, bundle, chat, export):
        module.add_parser(commands)
    return parser


@contextmanager
def _printable_logs() -> Iterator[None]:
    """Escapes control characters in log messages, of Transformers too, as they may quote files from others."""
    before = logging.getLogRecordFactory()

    def factory(*args, **kwargs):
        record = before(*args, **kwargs)
        record.msg, record.args = printable(record.getMessage()), None
        return record

    logging.setLogRecordFactory(factory)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; an error that the user can fix gives status 2 and one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    is_recipe = arguments[:1] and arguments[0] in recipes.RECIPES
    try:
        with _printable_logs():
            if is_recipe:
                done = recipes.run(arguments[0], arguments[1:])
            else:
                options = build_parser().parse_args(arguments)
                done = options.run(options)
        sys.stdout.flush()
        return done
    except BrokenPipeError:  # the reader of the output exited, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if is_recipe and not (isinstance(error, OSError) or recipes.is_refusal(error)):
            raise  # an error of a library during a run: the traceback is needed
        print(f"stitched-llama: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
