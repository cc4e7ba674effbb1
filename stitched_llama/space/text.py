"""Text of others in messages: errors of libraries in a line, and nothing that a terminal would obey."""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

_DIRECTIONS = frozenset(
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)  # they reorder what stands around them


def first_line(error: BaseException) -> str:
    """What an error says, in a line: of those of other libraries, which go on for many."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: object) -> str:
    """`text` with control characters, changes of direction and lone surrogates as escapes; newlines and tabs stay."""
    return "".join(c if c in "\n\t" or not _is_unsafe(c) else c.encode("unicode_escape").decode() for c in str(text))


@contextmanager
def named(what: object) -> Iterator[None]:
    """Makes a ValueError that names `what` of any exception that a library raises on content it did not expect.

    Errors of the system stay: of files, of memory, of a package that is not installed.
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
