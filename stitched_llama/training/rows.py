"""Instruction rows in Alpaca's schema: validation, skipped rows, held-out rows."""

import logging
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import Repr
from typing import Any

from .arguments import TextDataArguments
from .tables import RepeatedKeys, read_table

logger = logging.getLogger(__name__)
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60


@dataclass(frozen=True)
class Row:
    """One instruction, its optional input and the expected output."""

    instruction: str
    input: str
    output: str


def read_rows(source: str, on_bad_row: str = "error", split: str = "train") -> list[Row]:
    """Rows in Alpaca's schema from a JSON, JSONL, CSV, TSV, Parquet or Arrow file (optionally compressed by gzip, bzip2 or xz), from a
    folder of these or one written by `save_to_disk`, or from a Hub data set.

    An input that is null, NaN or blank becomes an empty string; numbers become their text.

    Args:
        on_bad_row: `"error"` stops at a row without instruction or output; `"skip"` skips and counts it, up to half of all rows.
        split: of a folder or Hub data set: `"train"`, `"test"`, ...; a file has the split `"train"` alone.

    Raises:
        ValueError: the source cannot be read, is empty, or a row is bad (named by file and row).
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row {on_bad_row!r} is unknown; 'error' or 'skip' is needed")
    rows: list[Row] = []
    reasons, first = Counter[str](), ""
    for location, content in read_table(source, split):
        try:
            rows.append(_row(content))
        except ValueError as error:
            if on_bad_row == "error":
                raise ValueError(f"{location}: {error}; mend it, or pass --on_bad_row skip") from None
            first = first or f"{location}: {error}"
            reasons[str(error).split(" is ")[0]] += 1
    skipped = reasons.total()
    if skipped > len(rows):
        raise ValueError(
            f"{source} holds {'more bad rows than good ones' if rows else 'no rows that can be used'}: {skipped} of "
            f"{skipped + len(rows)} would be skipped, the first is {first}; {_NEEDED}"
        )
    if skipped:
        counts = ", ".join(f"{count} for {reason}" for reason, count in reasons.most_common())
        logger.warning(
            "%s: %d of %d rows skipped (%s), the first is %s", source, skipped, skipped + len(rows), counts, first
        )
    if not rows:
        raise ValueError(f"{source} holds no rows: {_NEEDED}")
    return rows


_NEEDED = "objects with instruction, input and output are needed"


def _row(content: Any) -> Row:
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__} where an object with instruction, input and output is needed")
    if isinstance(content, RepeatedKeys):
        raise ValueError(f"{content.repeated} stands twice")
    instruction, extra, output = (_text(content, name) for name in ("instruction", "input", "output"))
    for name, value in (("instruction", instruction), ("output", output)):
        if not value.strip():
            held = f" (the row holds {_SHORT.repr(list(content))})" if content and name not in content else ""
            raise ValueError(f"{name} is {'blank' if value else 'missing'}{held}")
    found = output.strip()
    if "\n" in found:  # possibly code with an indented first line
        found = re.sub(r"\A(\s*\n)+", "", output.rstrip())
    return Row(instruction.strip(), extra.strip(), found)


def _text(content: dict[str, Any], name: str) -> str:
    """A field as text: numbers as written, null and NaN as the empty string.

    Raises:
        ValueError: another type, or text that cannot be encoded as UTF-8.
    """
    value = content.get(name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_SHORT.repr(value)}, a text or a number is needed")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is no text: half a character ({value[error.start]!r}) at {error.start}") from None
    return value


def drawn(count: int, size: int, seed: int) -> list[int]:
    """`size` of `count` indices, sampled at random by `seed`, ascending; all if `size` is 0 or not below `count`.

    Raises:
        ValueError: `size` is below 0.
    """
    if size < 0:
        raise ValueError(f"{size} of {count} held-out rows are asked for: 0 (all) or more (eval_size)")
    return sorted(random.Random(seed).sample(range(count), size)) if 0 < size < count else list(range(count))


def split_rows(rows: Sequence[Row], held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows and `held_out` others, sampled at random by `seed`.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if not 0 < held_out < len(rows):
        raise ValueError(f"{held_out} of {len(rows)} rows held out: keep at least one on each side (eval_size)")
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    return [rows[i] for i in order[held_out:]], [rows[i] for i in order[:held_out]]


def read_parts(args: TextDataArguments, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows, and held-out rows from `eval_data` or split off the training data.

    Raises:
        ValueError: a source cannot be read, or both name the same rows.
    """
    rows = read_rows(args.data, args.on_bad_row, args.train_split)
    if not args.eval_data:
        return split_rows(rows, args.eval_size, seed)
    if (args.data, args.train_split) == (args.eval_data, args.eval_split):
        raise ValueError(
            f"eval_data is the data, {args.data}, and its part {args.eval_split!r} too: leave it out, and rows are split off"
        )
    held_out = read_rows(args.eval_data, args.on_bad_row, args.eval_split)
    return rows, [held_out[index] for index in drawn(len(held_out), args.eval_size, seed)]
