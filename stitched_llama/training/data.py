"""Rows as labelled token ids, and batches of them."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .prompts import Template, TextTemplate, encode_prompt
from .rows import Row

logger = logging.getLogger(__name__)
IGNORED = -100  # the label Transformers' losses leave out
_CHARACTERS = 16  # a token is first taken to have at most so many


class InstructionDataset(Dataset):
    """Tokenised rows with labels on the response and what ends it.

    Args:
        template: for this tokenizer, or in words.
        max_length: tokens a row may have. What is too long loses the end of its response, down to a quarter of
            `max_length`, then the beginning of its prompt; a row never loses all labels.
        train_on_prompt: put labels on the prompt too.
        vocab_size: of the model; a row with a token beyond it is refused.

    Raises:
        ValueError: `max_length` below 8, the tokenizer has no EOS, or a token beyond `vocab_size`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        template: Template | TextTemplate,
        max_length: int = 512,
        train_on_prompt: bool = False,
        vocab_size: int | None = None,
    ):
        if max_length < 8:
            raise ValueError(f"max_length is {max_length}: at least 8 tokens are needed")
        template = template.of(tokenizer) if isinstance(template, TextTemplate) else template
        self.rows, self.truncated = list(rows), 0
        self.examples = [self._encode(row, tokenizer, template, max_length, train_on_prompt) for row in rows]
        if self.truncated:
            logger.warning("%d of %d rows were cut to %d tokens", self.truncated, len(rows), max_length)
        for number, example in enumerate(self.examples if vocab_size is not None else ()):
            if (highest := max(example["input_ids"])) >= vocab_size:
                raise ValueError(
                    f"row {number} of the data set has token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), the model's "
                    f"vocabulary ends at {vocab_size - 1}: take the tokenizer it was trained with, or another --template"
                )

    def _encode(
        self, row: Row, tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int, train_on_prompt: bool
    ) -> dict[str, list[int]]:
        prompt, response = template.render(row.instruction, row.input), template.begin + row.output + template.end
        prompt, response = encode_pair(
            tokenizer,
            _shortened(tokenizer, prompt, max_length, keep_end=True),
            _shortened(tokenizer, response, max_length),
        )
        if len(prompt) + len(response) > max_length:
            self.truncated += 1
            response = response[: max(max_length - len(prompt), max_length // 4)]
            room = max_length - len(response) - len(template.start)
            prompt = template.start + prompt[len(template.start) :][-room:]
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


def _shortened(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, keep_end: bool = False) -> str:
    """The beginning, or the end, of a text that is far longer than `tokens`: so much that it has twice as many.

    What is kept of its ids later lies `tokens` away from the cut, and megabytes of one row are not tokenised for it.
    """
    size = _CHARACTERS * tokens
    while size < len(text):
        part = text[-size:] if keep_end else text[:size]
        if len(encode_prompt(tokenizer, part)) >= 2 * tokens:
            return part
        size *= 4
    return text


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt as generation sees it, and of the response that follows it."""
    head, whole = encode_prompt(tokenizer, prompt), encode_prompt(tokenizer, prompt + response)
    if whole[: len(head)] == head:
        return head, whole[len(head) :]
    line, after = (
        encode_prompt(tokenizer, "\n"),
        encode_prompt(tokenizer, "\n" + response),
    )  # a piece would span the border
    inside = after[: len(line)] == line  # of a text, where SentencePiece puts no space before the first word
    return head, after[len(line) :] if inside else encode_prompt(tokenizer, response)


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


def pad_token_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> int:
    """The padding id: the tokenizer's, or for want of one its unk or EOS. What is padded is masked and has no label, so any id within
    `vocab_size` serves; Alpaca's `[PAD]`, which was added behind it, does not.

    Raises:
        ValueError: the tokenizer has none of these.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if candidate is not None and (vocab_size is None or candidate < vocab_size):
            return candidate
    if vocab_size is not None:
        return 0
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
