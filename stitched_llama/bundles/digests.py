"""SHA-256 of a folder's files in `digests.json`, to detect files that changed since they were saved.

They detect damage and edits, not who saved the files: whoever may write the folder may write new digests.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from .atomic import write_atomically

DIGESTS = "digests.json"
_WAY_OUT = (
    "restore or download it again; if you changed it on purpose, record it anew with `stitched-llama bundle digest`, "
    "or load it once with verify=False (--no-verify)"
)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(folder: str | Path, names: Iterable[str]) -> None:
    """Records the named files of `folder` as they are now; what was recorded of others stays.

    The file is replaced in one step. Call it once the named files are whole.

    Raises:
        OSError: a named file is not there.
        ValueError: the `digests.json` that is there is damaged.
    """
    folder = Path(folder)
    found = {} if not (folder / DIGESTS).is_file() else read_digests(folder)
    text = digests_text(found | {name: sha256(folder / name) for name in names})
    write_atomically(folder / DIGESTS, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def digests_text(digests: Mapping[str, str]) -> str:
    """The content of `digests.json`, of file name -> SHA-256."""
    return json.dumps({"sha256": digests}, indent=2, sort_keys=True) + "\n"


def read_digests(folder: str | Path) -> dict[str, str]:
    """File name -> SHA-256, as recorded.

    Raises:
        ValueError: there is no `digests.json`, or it is damaged.
    """
    path = Path(folder) / DIGESTS
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {DIGESTS}: it was written by an older version or is incomplete; if you trust it, record it with "
            "`stitched-llama bundle digest`, or load it once with verify=False (--no-verify)"
        )
    try:
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["sha256"]
        whole = all(isinstance(value, str) and Path(name).name == name for name, value in found.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged: {_WAY_OUT}")
    return found


def verify_digests(folder: str | Path, names: Iterable[str] | None = None) -> None:
    """Reads files whole and compares them with what `digests.json` says.

    Args:
        names: the files to compare; all that are recorded by default. A file that is not recorded is refused.

    Raises:
        ValueError: `digests.json` is missing or damaged, a file is missing, not recorded, or differs; names it, and both digests.
    """
    folder, recorded = Path(folder), read_digests(folder)
    for name in sorted(recorded if names is None else names):
        if name not in recorded:
            raise ValueError(f"{folder / name} is not recorded in {DIGESTS}: it was added later; {_WAY_OUT}")
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}, which {DIGESTS} records: {_WAY_OUT}")
        if (found := sha256(folder / name)) != recorded[name]:
            raise ValueError(
                f"{folder / name} changed: it has SHA-256 {found}, {DIGESTS} says {recorded[name]}; {_WAY_OUT}"
            )
