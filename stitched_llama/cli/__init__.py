"""The command `stitched-llama`.

space   list the stitches of anchors and their costs, from config.json alone
bundle  show or verify a bundle
chat    talk to a bundle at any size; conversation holds the turns
"""

import argparse
import os
import sys
from collections.abc import Sequence

from . import bundle, chat, space


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stitched-llama", description="One fine-tune of two or more frozen models, every size between them."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (space, bundle, chat):
        module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 2 and one line on stderr where the user can mend something."""
    options = build_parser().parse_args(arguments)
    try:
        done = options.run(options)
        sys.stdout.flush()
        return done
    except BrokenPipeError:  # the reader of our output left, `| head` say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"stitched-llama: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
