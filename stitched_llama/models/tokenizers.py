"""Anchors that belong together have one tokenizer."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stitched_llama.space import first_line, printable


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False, **hub: Any) -> PreTrainedTokenizerBase:
    """A tokenizer from its files; no code of a repository is run unless it is trusted.

    Raises:
        ValueError: it is missing or cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **hub)
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # bare exceptions, recursion, and panics of the library below, which are no Exception
        raise ValueError(f"the tokenizer of {name_or_path} cannot be read: {first_line(error)}") from error


def check_token_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Refuses token ids [batch, tokens] that have no row in the embedding; a GPU would only say that an assertion failed.

    Raises:
        ValueError: names the id and the size of the vocabulary.
    """
    if torch.compiler.is_compiling() or not input_ids.numel():
        return
    lowest, highest = torch.stack(input_ids.aminmax()).tolist()
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"token id {lowest if lowest < 0 else highest} is outside the {vocab_size} of the vocabulary: take the tokenizer that "
            "the anchors were trained with; where a pad token was added behind it, pad with another id (pad_token_id)"
        )


def check_tokenizers(names: Sequence[Any], vocab_sizes: Sequence[int], **hub: Any) -> None:
    """Refuses anchors whose tokenizers differ; warns where an anchor has none to compare. Loaded models have none.

    Vocabularies of different sizes are taken for one that is padded differently, where the tokenizers say so.

    Raises:
        ValueError: two anchors give different ids to the same piece, or read the same text as different pieces; or their
            vocabularies differ in more than padding, or may do so.
    """
    tokenizers = []
    for name in names:
        if not isinstance(name, str):
            continue
        try:
            tokenizers.append((name, load_tokenizer(name, **hub)))
        except ValueError as error:
            logging.getLogger(__name__).warning(
                "%s has no tokenizer that could be compared with the other anchors' (%s): make sure they are one",
                name,
                printable(first_line(error)),
            )
    for (name, ours), (other, theirs) in zip(tokenizers, tokenizers[1:]):
        _check_pieces(name, ours.get_vocab(), other, theirs.get_vocab())
        for special in ("bos_token_id", "eos_token_id"):
            if getattr(ours, special) != getattr(theirs, special):
                raise ValueError(
                    f"anchors do not belong together: {special} is {getattr(ours, special)} in {name} and "
                    f"{getattr(theirs, special)} in {other}; stitches need one tokenizer"
                )
        if ours(_PROBE).input_ids != theirs(_PROBE).input_ids:
            raise ValueError(
                f"anchors do not belong together: {name} and {other} read {_PROBE!r} as different ids though their pieces "
                "are the same (prefix space or normalisation); stitches need one tokenizer"
            )
    if len(set(vocab_sizes)) > 1:
        _check_padding(tokenizers, len(names), min(vocab_sizes), max(vocab_sizes))


def _check_padding(tokenizers: Sequence[tuple[str, Any]], anchors: int, smaller: int, larger: int) -> None:
    """Refuses vocabularies of two sizes unless every anchor has the tokenizer and all its pieces are in both."""
    differ = f"anchors do not belong together: vocab_size is {smaller} in one and {larger} in another"
    if len(tokenizers) < anchors:
        raise ValueError(
            f"{differ}, and not all have a tokenizer that shows the rest to be padding: name folders or Hub ids with the "
            "tokenizer in them, or resize the embeddings (resize_token_embeddings)"
        )
    name, tokenizer = tokenizers[0]
    piece, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= smaller:
        raise ValueError(
            f"{differ}, and the rest is no padding: the tokenizer of {name} gives {piece!r} the id {highest}; resize the "
            f"smaller embedding to {highest + 1} rows or more (resize_token_embeddings), or remove that piece"
        )


_PROBE = "hi  Ünïcode 你好 🦙\n\tdef f(x): return 1234567"


def _check_pieces(name: str, vocabulary: dict[str, int], other: str, theirs: dict[str, int]) -> None:
    if vocabulary != theirs:
        piece = min(p for p in vocabulary.keys() | theirs.keys() if vocabulary.get(p) != theirs.get(p))
        raise ValueError(
            f"anchors do not belong together: piece {piece!r} has id {vocabulary.get(piece)} in {name} and "
            f"{theirs.get(piece)} in {other}; stitches need one tokenizer"
        )
