"""Unlabelled text and chat data as blocks of tokens of one length."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from stitched_llama.models.tokenizers import check_token_ids
from stitched_llama.training import Row, read_rows, render_chat, template

_PIECE = 20_000  # characters


def read_documents(source: str, render: Callable[[Row], str]) -> list[str]:
    """The documents of a source: paragraphs of about 4,000 characters of a `.txt` file, else the rendered rows of what `read_rows` reads.

    Raises:
        ValueError: the source cannot be read, or holds no text.
    """
    if Path(source).suffix.lower() != ".txt":
        return [render(row) for row in read_rows(source, on_bad_row="skip")]
    if not Path(source).is_file():
        raise ValueError(f"there is no file {source}")
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 ({error}): convert it") from None
    documents, current = [], ""
    for paragraph in text.split("\n\n"):
        current += paragraph.strip() + "\n\n"
        if len(current) >= 4000:
            documents.append(current)
            current = ""
    documents += [current] if current.strip() else []
    if not documents:
        raise ValueError(f"{source} holds no text")
    return documents


def row_renderer(tokenizer: PreTrainedTokenizerBase) -> Callable[[Row], str]:
    """A function that renders an instruction row as a document, by the tokenizer's chat template or else Alpaca's."""

    def render(row: Row) -> str:
        if tokenizer.chat_template is None:
            return template("alpaca").render(row.instruction, row.input) + row.output
        question = row.instruction + (f"\n{row.input}" if row.input else "")
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row.output}]
        return render_chat(tokenizer, turns, add_generation_prompt=False)

    return render


class TokenBlocks(Dataset):
    """Documents in random order, concatenated and cut into blocks of `block_size` tokens.

    Args:
        documents: texts; each is followed by the tokenizer's end token.
        max_blocks: maximum number of blocks; None for all.
        seed: of the order.
        vocab_size: of the model that reads them; None does not look.

    Raises:
        ValueError: the text is shorter than one block, or a token is outside the vocabulary.
    """

    def __init__(
        self,
        documents: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        max_blocks: int | None = None,
        seed: int = 0,
        vocab_size: int | None = None,
    ):
        order = random.Random(seed).sample(range(len(documents)), len(documents))
        wanted = None if max_blocks is None else max_blocks * block_size
        tokens = _token_stream((documents[index] for index in order), tokenizer, wanted)
        count = min(len(tokens) // block_size, max_blocks or len(tokens))
        if not count:
            raise ValueError(
                f"the text is too short to align on: {len(tokens)} tokens do not fill one block of {block_size}; give more text"
            )
        self.blocks = torch.tensor(tokens[: count * block_size]).view(count, block_size)
        if vocab_size is not None:
            check_token_ids(self.blocks, vocab_size)

    @property
    def digest(self) -> str:
        """SHA-256 of the blocks."""
        return hashlib.sha256(self.blocks.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` and `labels`, [block_size] each; the labels are the same ids."""
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def _token_stream(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> list[int]:
    tokens: list[int] = []
    for document in documents:
        for piece in _pieces(document):
            tokens += tokenizer(piece, add_special_tokens=False).input_ids
            if wanted is not None and len(tokens) >= wanted:
                return tokens
        if tokenizer.eos_token_id is not None and tokens[-1:] != [tokenizer.eos_token_id]:
            tokens.append(tokenizer.eos_token_id)
    return tokens


def _pieces(document: str) -> Iterator[str]:
    """A document in pieces of at most `_PIECE` characters, cut before a space: megabytes in one take a tokenizer minutes."""
    start = 0
    while len(document) - start > _PIECE:
        stop = document.rfind(" ", start + _PIECE // 2, start + _PIECE)
        stop = start + _PIECE if stop < 0 else stop
        yield document[start:stop]
        start = stop
    yield document[start:]
