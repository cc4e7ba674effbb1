"""Foreign text in messages: errors of libraries in one line, control characters escaped."""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

_DIRECTIONS = frozenset(
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)  # bidirectional controls, which reorder the text around them


def first_line(error: BaseException) -> str:
    """The first line of an error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: object) -> str:
    """`text` with control characters, bidirectional controls and lone surrogates escaped; newlines and tabs are kept."""
    return "".join(c if c in "\n\t" or not _is_unsafe(c) else c.encode("unicode_escape").decode() for c in str(text))


@contextmanager
def named(what: object) -> Iterator[None]:
    """Converts any exception that a library raises on unexpected content to a ValueError that names `what`.

    Errors of files, memory and missing packages are not converted.
    """
    try:
        yield
    except (OSError, MemoryError, ImportError):
        raise
    except ValueError as error:
        if str(what) in str(error):
            raise
        raise ValueError(f"{what}: {error}") from error
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a device
            raise
        raise ValueError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:500]}") from error


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS
