"""Writes a set of files so that a reader sees all of the old ones or all of the new ones, whenever the writer dies.

New files are written and flushed into `.staged/`; a marker then says that the set is whole; only then are they renamed
into place. Before the marker the old files stand untouched; after it `recover` finishes the renames. A reader that finds
a stage without marker leaves it alone: its writer may be at work.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STAGE, _MARKER = ".staged", "COMPLETE"


@contextmanager
def staged_files(folder: str | Path) -> Iterator[Path]:
    """A folder to write new files into; on leaving without an error they replace those of the same name in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    stage = folder / _STAGE
    shutil.rmtree(stage, ignore_errors=True)  # of a writer that died
    stage.mkdir()
    try:
        yield stage
        for path in stage.iterdir():
            _flush(path)
        (stage / _MARKER).touch()
        _flush(stage / _MARKER)
        _flush(stage)
    except BaseException:
        (stage / _MARKER).unlink(missing_ok=True)
        shutil.rmtree(stage, ignore_errors=True)
        raise
    recover(folder)


def recover(folder: str | Path) -> None:
    """Finishes a save that was interrupted after its files were whole; does nothing else."""
    folder = Path(folder)
    stage = folder / _STAGE
    if not (stage / _MARKER).exists():
        return
    for path in sorted(stage.iterdir()):
        if path.name != _MARKER:
            with suppress(FileNotFoundError):  # another process finishes the same save
                os.replace(path, folder / path.name)
    (stage / _MARKER).unlink(missing_ok=True)
    _flush(folder)
    shutil.rmtree(stage, ignore_errors=True)


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """One file, by way of a temporary neighbour: `write(temporary)` fills it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
