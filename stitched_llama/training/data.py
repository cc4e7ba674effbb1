"""Instruction rows in Alpaca's schema: read, check, split, tokenise, batch."""

import hashlib
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .prompts import Template

logger = logging.getLogger(__name__)
IGNORED = -100  # the label Transformers' losses leave out


@dataclass(frozen=True)
class Row:
    """One instruction, its optional input and the wanted output."""

    instruction: str
    input: str
    output: str


def read_rows(source: str, on_bad_row: str = "error") -> list[Row]:
    """Rows of a local JSON, JSONL or Parquet file in Alpaca's schema, or of a Hub data set (its train split).

    Args:
        on_bad_row: `"error"` stops at a row without instruction or output; `"skip"` leaves it out and counts.

    Raises:
        ValueError: the source cannot be read, is empty, or a row is bad (named by file and row).
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row {on_bad_row!r} is unknown; 'error' or 'skip' is needed")
    rows: list[Row] = []
    skipped: list[Any] = []
    for place, content in _read(source):
        try:
            rows.append(_row(content))
        except ValueError as error:
            if on_bad_row == "error":
                raise ValueError(f"{source}, {place}: {error}; mend it, or pass --on_bad_row skip") from None
            skipped = skipped or [0, f"{place}: {error}"]
            skipped[0] += 1
    if skipped:
        total = skipped[0] + len(rows)
        logger.warning("%s: %d of %d rows skipped, the first is %s", source, skipped[0], total, skipped[1])
    if not rows:
        raise ValueError(f"{source} holds no rows: a list of objects with instruction, input and output is needed")
    return rows


def _row(content: Any) -> Row:
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__} where an object with instruction, input and output is needed")
    for name in ("instruction", "output"):
        value = content.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} is {'missing' if value is None else repr(value)}")
    extra = content.get("input")
    if extra is not None and not isinstance(extra, str):
        raise ValueError(f"input is {extra!r}, a text is needed")
    output = content["output"].strip()
    if "\n" in output:  # it may be code, whose first line is indented as well
        output = re.sub(r"\A(\s*\n)+", "", content["output"].rstrip())
    return Row(content["instruction"].strip(), (extra or "").strip(), output)


def _read(source: str) -> Iterable[tuple[str, Any]]:
    """(place, content) of each row: "row 0" on, or "line 1" on in JSONL."""
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{source} is a folder: name a JSON, JSONL or Parquet file in it, or a Hub data set")
    if not path.is_file() and path.suffix in (".json", ".jsonl", ".parquet"):
        raise ValueError(f"there is no file {source}")
    if not path.is_file() or path.suffix == ".parquet":
        return ((f"row {number}", content) for number, content in enumerate(_table(source)))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 ({error}): convert it") from None
    if path.suffix == ".jsonl":
        lines = ((f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        return [(place, _parse(line, f"{source}, {place}")) for place, line in lines]
    content = _parse(text, source)
    if not isinstance(content, list):
        raise ValueError(f"{source} holds a {type(content).__name__} where a list of rows is needed")
    return [(f"row {number}", row) for number, row in enumerate(content)]


def _table(source: str) -> Iterable[Any]:
    from datasets import Dataset as Table
    from datasets import load_dataset

    try:
        return Table.from_parquet(source) if source.endswith(".parquet") else load_dataset(source, split="train")
    except Exception as error:  # each back end has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source} cannot be read as a Parquet file or a data set of the Hub: {reason}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def drawn(count: int, size: int, seed: int) -> list[int]:
    """`size` of `count` indices in their order, drawn at random by `seed`; all of them where there are no more, or for 0.

    Raises:
        ValueError: `size` is below 0.
    """
    if size < 0:
        raise ValueError(f"{size} of {count} held-out rows are asked for: 0 (all) or more (eval_size)")
    return sorted(random.Random(seed).sample(range(count), size)) if 0 < size < count else list(range(count))


def split_rows(rows: Sequence[Row], held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows and `held_out` others, drawn at random by `seed`.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if not 0 < held_out < len(rows):
        raise ValueError(f"{held_out} of {len(rows)} rows held out: keep at least one on each side (eval_size)")
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    return [rows[i] for i in order[held_out:]], [rows[i] for i in order[:held_out]]


class InstructionDataset(Dataset):
    """Tokenised rows with labels on the response and its EOS.

    Args:
        max_length: tokens a row may have. What is too long loses the end of its response, down to a quarter of
            `max_length`, then the beginning of its prompt; a row never loses all labels.
        train_on_prompt: put labels on the prompt too.

    Raises:
        ValueError: `max_length` below 8, or the tokenizer has no EOS.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        max_length: int = 512,
        train_on_prompt: bool = False,
    ):
        if max_length < 8:
            raise ValueError(f"max_length is {max_length}: at least 8 tokens are needed")
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no EOS token, so a model could not learn to stop: set tokenizer.eos_token"
            )
        self.rows, self.truncated = list(rows), 0
        self.examples = [self._encode(row, tokenizer, template, max_length, train_on_prompt) for row in rows]
        if self.truncated:
            logger.warning("%d of %d rows were cut to %d tokens", self.truncated, len(rows), max_length)

    def _encode(
        self, row: Row, tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int, train_on_prompt: bool
    ) -> dict[str, list[int]]:
        prompt, response = encode_pair(tokenizer, template.render(row.instruction, row.input), row.output)
        if len(prompt) + len(response) > max_length:
            self.truncated += 1
            response = response[: max(max_length - len(prompt), max_length // 4)]
            bos = prompt[:1] if prompt[:1] == [tokenizer.bos_token_id] else []
            room = max_length - len(response) - len(bos)
            prompt = bos + (prompt[len(bos) :][-room:])
        labels = (prompt if train_on_prompt else [IGNORED] * len(prompt)) + response
        return {"input_ids": prompt + response, "labels": labels}

    @cached_property
    def digest(self) -> str:
        """Of all rows as they are tokenised: a resumed run has the same."""
        return hashlib.sha256(json.dumps(self.examples).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, in training and generation alike: with BOS where the tokenizer has it, without EOS."""
    ids = tokenizer(prompt).input_ids
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt as generation sees it, and of the response that follows it, with EOS."""
    eos = tokenizer.eos_token_id
    head, whole = encode_prompt(tokenizer, prompt), encode_prompt(tokenizer, prompt + response)
    if whole[: len(head)] == head:
        return head, whole[len(head) :] + [eos]
    return head, tokenizer(response, add_special_tokens=False).input_ids + [eos]  # a piece would span the border


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right to the longest of the batch.

    Shapes: input_ids, attention_mask, labels [batch, tokens].
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> Tensor:
            return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows])
        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "attention_mask": mask,
            "labels": padded("labels", IGNORED),
        }


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id; LLaMA has none, so unk, else EOS (labels are masked, so EOS is still learnt).

    Raises:
        ValueError: the tokenizer has none of these.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    raise ValueError("the tokenizer has neither pad, unk nor EOS token: set tokenizer.pad_token")


@dataclass(frozen=True)
class _Batches:
    dataset: Dataset
    collator: Any
    size: int
    limit: int | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        count = len(self.dataset) if self.limit is None else min(self.limit, len(self.dataset))
        for start in range(0, count, self.size):
            yield self.collator([self.dataset[i] for i in range(start, min(start + self.size, count))])


def batches(dataset: Dataset, collator: Any, size: int, limit: int | None = None) -> Iterable[dict[str, Tensor]]:
    """Consecutive batches of the first `limit` rows or pictures, made anew at every pass; none is kept."""
    return _Batches(dataset, collator, size, limit)
