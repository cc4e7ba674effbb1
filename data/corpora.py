"""Tokenizers and token streams of the anchors: skills and library documentation, or books.

The demo corpus needs nothing but Python itself: the notation of `skills.py`, and the English of the standard
library's documentation (its docstrings and the help topics of `pydoc`). The books corpus is any text files.
"""

from __future__ import annotations

import ast
import itertools
import math
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import skills
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>", "unk_token": "<|unk|>"}
RESERVED_TOKENS = [f"<|reserved_{i}|>" for i in range(4)]
HELDOUT_SHARE = 0.02


def wrap(tokenizer: Tokenizer, context: int) -> PreTrainedTokenizerFast:
    """The Transformers face of a tokenizer. No bos or eos is added: who packs or prompts places them."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **SPECIAL_TOKENS,
    )


def byte_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """264 tokens: four special ones, four reserved ones, then byte b as token 8 + b."""
    names = [*SPECIAL_TOKENS.values(), *RESERVED_TOKENS]
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}  # the byte-to-character table of byte-level BPE
    symbols |= {byte: chr(256 + i) for i, byte in enumerate(unprintable)}
    vocabulary = {name: i for i, name in enumerate(names)}
    vocabulary |= {symbols[byte]: len(names) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return wrap(tokenizer, context)


def book_tokenizer(texts: Sequence[str], pieces: int, context: int) -> PreTrainedTokenizerFast:
    """BPE pieces with byte fallback, trained by SentencePiece, that keep every space and newline.

    As in LLaMA's own tokenizer, a literal U+2581 in the text comes back as a space.
    """
    import sentencepiece  # the demo preset does without

    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder, "sample.txt")
        sample.write_text("\n".join(texts), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(sample),
            model_prefix=str(Path(folder, "pieces")),
            model_type="bpe",
            vocab_size=pieces,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            num_threads=1,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            max_sentence_length=100_000,
            minloglevel=2,
            pad_piece=SPECIAL_TOKENS["pad_token"],
            bos_piece=SPECIAL_TOKENS["bos_token"],
            eos_piece=SPECIAL_TOKENS["eos_token"],
            unk_piece=SPECIAL_TOKENS["unk_token"],
        )
        trained = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder, "pieces.model")))
    vocabulary = {trained.id_to_piece(i): i for i in range(trained.get_piece_size())}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges_of(vocabulary),
            byte_fallback=True,
            unk_token=SPECIAL_TOKENS["unk_token"],
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS.values()])
    return wrap(tokenizer, context)


def merges_of(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The merges behind a vocabulary of BPE pieces, in the order they were learned.

    SentencePiece numbers pieces in the order of their merges, so a piece came from two earlier ones;
    where several splits are possible all are listed, and the earliest parts come first.
    """
    merges = []
    for piece, rank in vocabulary.items():
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
        merges += [(rank, vocabulary[left], vocabulary[right], left, right) for left, right in known]
    return [(left, right) for *_, left, right in sorted(merges)]


def library_documents() -> list[str]:
    """English that every Python carries: help topics, and the longer docstrings of the standard library."""
    documents = list(topics.values())
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idlelib", "site-packages", "lib2to3", "__pycache__"}
    for path in sorted(library.rglob("*.py")):
        if left_out.isdisjoint(path.relative_to(library).parts):
            try:
                nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            except (SyntaxError, UnicodeDecodeError):  # a few files are broken on purpose
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            docstrings = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
            documents += [text for text in docstrings if text and len(text) >= 200]
    wordings = [wording.lower() for task in skills.SKILLS.values() for wording in task.wordings]
    return [text for text in dict.fromkeys(documents) if not any(wording in text.lower() for wording in wordings)]


def pack(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> Tensor:
    """One long row of tokens, every document closed by eos."""
    rows = tokenizer(list(documents), verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)])


class Corpus:
    """Training and validation tokens of one or more sources, drawn as blocks in given shares."""

    def __init__(self, sources: dict[str, tuple[float, Tensor, Tensor]], block: int, seed: int):
        """`sources` maps a name to (share, training tokens, validation tokens)."""
        self.sources, self.block = sources, block
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, size: int) -> Tensor:
        """Random blocks for training, each from one source."""  # [size, block]
        shares = torch.tensor([share for share, _, _ in self.sources.values()])
        choices = torch.multinomial(shares, size, replacement=True, generator=self.generator).tolist()
        tokens = [list(self.sources.values())[choice][1] for choice in choices]
        starts = [int(torch.randint(len(row) - self.block, (), generator=self.generator)) for row in tokens]
        return torch.stack([row[start : start + self.block] for row, start in zip(tokens, starts, strict=True)])

    def validation(self, name: str, limit: int) -> Tensor:
        """Blocks spread evenly over what a source holds out."""  # [at most limit, block]
        tokens = self.sources[name][2]
        blocks = tokens[: len(tokens) // self.block * self.block].view(-1, self.block)
        return blocks[:: max(1, math.ceil(len(blocks) / limit))]


def demo_corpus(tokenizer: PreTrainedTokenizerFast, block: int, training_tokens: int, seed: int) -> Corpus:
    """75 % notation of the skills, 25 % documentation; validation on held-out inputs and documents."""

    def notation(token_count: int, heldout: bool) -> Tensor:
        stream = skills.notation_stream(seed, heldout)
        documents, length = [], 0
        while length < token_count:
            documents.append(next(stream))
            length += len(documents[-1]) + 1
        return pack(tokenizer, documents)

    documents = library_documents()
    every = round(1 / HELDOUT_SHARE)
    kept_out = list(itertools.islice(documents, 0, None, every))
    rest = [text for i, text in enumerate(documents) if i % every]
    return Corpus(
        {
            "notation": (0.75, notation(training_tokens, False), notation(40_000, True)),
            "documentation": (0.25, pack(tokenizer, rest), pack(tokenizer, kept_out)),
        },
        block,
        seed,
    )


def split_books(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The texts without their ends, and the ends, which are held out."""
    cuts = [int(len(text) * (1 - HELDOUT_SHARE)) for text in texts]
    return (
        [text[:cut] for text, cut in zip(texts, cuts, strict=True)],
        [text[cut:] for text, cut in zip(texts, cuts, strict=True)],
    )


def books_corpus(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], ends: Sequence[str], block: int, seed: int
) -> Corpus:
    """All texts in proportion to their length; validation on blocks from all their ends."""
    return Corpus({"books": (1.0, pack(tokenizer, texts), pack(tokenizer, ends))}, block, seed)
