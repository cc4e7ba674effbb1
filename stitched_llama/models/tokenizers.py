"""Anchors that belong together have one tokenizer."""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from stitched_llama.space import first_line, printable


def check_tokenizers(names: Sequence[Any], trust_remote_code: bool = False, **hub: Any) -> None:
    """Refuses anchors whose tokenizers differ; warns where an anchor has none to compare. Loaded models have none.

    Raises:
        ValueError: two anchors give different ids to the same piece, or read the same text as different pieces.
    """
    tokenizers = []
    for name in names:
        if not isinstance(name, str):
            continue
        try:
            tokenizers.append((name, AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **hub)))
        except (OSError, ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
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


_PROBE = "hi  Ünïcode 你好 🦙\n\tdef f(x): return 1234567"


def _check_pieces(name: str, vocabulary: dict[str, int], other: str, theirs: dict[str, int]) -> None:
    if vocabulary != theirs:
        piece = min(p for p in vocabulary.keys() | theirs.keys() if vocabulary.get(p) != theirs.get(p))
        raise ValueError(
            f"anchors do not belong together: piece {piece!r} has id {vocabulary.get(piece)} in {name} and "
            f"{theirs.get(piece)} in {other}; stitches need one tokenizer"
        )
