"""Tokenizer and token streams of the anchors on books: any plain-text files."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>", "unk_token": "<|unk|>"}
HELDOUT_SHARE = 0.02


def book_tokenizer(texts: Sequence[str], pieces: int, context: int) -> PreTrainedTokenizerFast:
    """BPE pieces with byte fallback, trained by SentencePiece, that keep every space and newline.

    As in LLaMA's own tokenizer, a literal U+2581 in the text comes back as a space. No bos or eos is added: who packs or
    prompts places them.
    """
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **SPECIAL_TOKENS,
    )


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


def split_books(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The texts without their ends, and the ends, which are held out."""
    cuts = [int(len(text) * (1 - HELDOUT_SHARE)) for text in texts]
    return (
        [text[:cut] for text, cut in zip(texts, cuts, strict=True)],
        [text[cut:] for text, cut in zip(texts, cuts, strict=True)],
    )


def pack(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> Tensor:
    """One long row of tokens, every document closed by eos."""
    rows = tokenizer(list(documents), verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)])


class Corpus:
    """Blocks of training and validation tokens; `training` and `validation` are [tokens]."""

    def __init__(self, training: Tensor, validation: Tensor, block: int, seed: int):
        self.training, self.validation, self.block = training, validation, block
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, size: int) -> Tensor:
        """Random blocks for training."""  # [size, block]
        starts = torch.randint(len(self.training) - self.block, (size,), generator=self.generator).tolist()
        return torch.stack([self.training[start : start + self.block] for start in starts])

    def validation_blocks(self, limit: int) -> Tensor:
        """Blocks spread evenly over what is held out."""  # [at most limit, block]
        blocks = self.validation[: len(self.validation) // self.block * self.block].view(-1, self.block)
        return blocks[:: max(1, math.ceil(len(blocks) / limit))]
