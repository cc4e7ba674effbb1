"""Writes a set of files so that a reader sees all old or all new ones, also if the writer is killed.

New files are written and flushed into `.staged/`; a marker then records that the set is complete; only then are they renamed
to their final names. Before the marker the old files are unchanged; after it `recover` finishes the renames.

A writer holds a lock on the folder from the first file to the last rename, a reader shares one while it reads: a reader
gets the files of one save, and of two writers the second waits. The lock is the operating system's (`flock` of the folder
itself), leaves no file and ends with its process. Where there is none (Windows, some network file systems) one writer at
a time is up to the caller; the digests then detect a mixture.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_STAGE, _MARKER = ".staged", "COMPLETE"
LOCK_SECONDS = 300.0


@contextmanager
def staged_files(folder: str | Path) -> Iterator[Path]:
    """A folder to write new files into; on leaving without an error they replace those of the same name in `folder`.

    Raises:
        ValueError: `.staged` is not a folder.
        OSError: another process holds the folder for five minutes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _finish(folder)
        stage = folder / _STAGE
        if stage.exists():
            shutil.rmtree(stage)  # of a writer that died
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
        _finish(folder)


@contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """A context in which no writer changes the files; an interrupted save is finished first.

    Raises:
        ValueError: `.staged` is not a folder.
        OSError: another process saves into the folder for five minutes.
    """
    folder = Path(folder)
    while True:
        recover(folder)
        with _locked(folder, shared=True):
            if not _is_complete(folder):  # else a writer died in between
                yield
                return


def recover(folder: str | Path) -> None:
    """Finishes a save that was interrupted after its files were complete."""
    folder = Path(folder)
    if folder.is_dir() and _is_complete(folder):
        with _locked(folder):
            _finish(folder)


def _is_complete(folder: Path) -> bool:
    stage = folder / _STAGE
    if stage.is_symlink() or (stage.exists() and not stage.is_dir()):
        raise ValueError(
            f"{stage} is a link or a file where a save has a folder of its own: remove it, it is not followed"
        )
    return (stage / _MARKER).exists()


def _finish(folder: Path) -> None:
    """Renames the files of a complete set."""
    if not _is_complete(folder):
        return
    stage = folder / _STAGE
    paths = [path for path in sorted(stage.iterdir()) if path.name != _MARKER]
    if wrong := [path for path in paths if path.is_symlink() or not path.is_file()]:
        raise ValueError(f"{wrong[0]} is a link or a folder where a save has files alone: remove {stage}")
    for path in paths:
        with suppress(FileNotFoundError):  # without locks another process may finish the same save
            os.replace(path, folder / path.name)
    (stage / _MARKER).unlink(missing_ok=True)
    _flush(folder)
    shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _locked(folder: Path, shared: bool = False) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    descriptor, end = os.open(folder, os.O_RDONLY), time.monotonic() + LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    what = "saves into" if shared else "reads or saves into"
                    raise OSError(
                        f"another process {what} {folder} for more than {LOCK_SECONDS:.0f} seconds: wait for it, or end it"
                    ) from None
                time.sleep(0.002)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for children that were forked meanwhile
        os.close(descriptor)


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """One file, by way of a temporary neighbour: `write(temporary)` fills it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    temporary.touch(exist_ok=False)  # a new file: no link that waits there is followed
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
