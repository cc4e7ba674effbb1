"""Instruction rows as labelled token ids, and batches of them."""

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
IGNORED = -100  # the label that losses of Transformers ignore
_CHARACTERS = 16  # initial upper bound of characters a token


class InstructionDataset(Dataset):
    """Tokenised rows with labels on the response and its end token.

    Args:
        template: bound to this tokenizer, or a `TextTemplate`.
        max_length: maximum tokens of a row. A longer row is truncated at the end of its response, down to a quarter of
            `max_length`, then at the beginning of its prompt; a row always keeps labels.
        train_on_prompt: label the prompt too.
        vocab_size: of the model; a row with a token id beyond it raises.

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
        """Digest of all tokenised rows, compared when a run is resumed."""
        return hashlib.sha256(json.dumps(self.examples).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]


def _shortened(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, keep_end: bool = False) -> str:
    """The beginning, or the end, of a text: at least twice `tokens` tokens of it, so that megabytes of one row are not tokenised.

    The ids that are kept later lie at least `tokens` away from the cut, so they equal those of the whole text.
    """
    size = _CHARACTERS * tokens
    while size < len(text):
        part = text[-size:] if keep_end else text[:size]
        if len(encode_prompt(tokenizer, part)) >= 2 * tokens:
            return part
        size *= 4
    return text


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt as in generation, and of the response after it."""
    start, whole = encode_prompt(tokenizer, prompt), encode_prompt(tokenizer, prompt + response)
    if whole[: len(start)] == start:
        return start, whole[len(start) :]
    line, after = (
        encode_prompt(tokenizer, "\n"),
        encode_prompt(tokenizer, "\n" + response),
    )  # a token would span prompt and response
    inside = after[: len(line)] == line  # inside a text SentencePiece adds no space before the first word
    return start, after[len(line) :] if inside else encode_prompt(tokenizer, response)


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
    """The padding id: the tokenizer's pad token, else its unk or EOS. Padding is masked and has no label, so any id within `vocab_size`
    is valid; Alpaca's `[PAD]`, which was added beyond it, is not.

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
    """Consecutive batches of the first `limit` rows or images, built again at every iteration and not stored."""
    return _Batches(dataset, collator, size, limit)
