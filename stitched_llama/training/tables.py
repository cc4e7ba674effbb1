"""Reads rows from a JSON, CSV or Parquet file, a folder, a data set saved to disk, or the Hub.

`datasets` finds the files of folders and Hub ids, and reads Parquet and Arrow. JSON and CSV are read here: `datasets` (5.2) turns
strings that look like dates into timestamps, drops lone surrogates, reads long integers as infinity, crashes on deep nesting, and
reads "NA" and "None" in a CSV as missing.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_UNPACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
_SUFFIXES = (".json", ".jsonl", ".ndjson", *_DELIMITERS, *_BUILDERS)
_METADATA = ("dataset_info.json", "dataset_infos.json")
_SPACE = re.compile(r"[ \t\r\n]*")


class RepeatedKeys(dict):
    """A JSON object with a repeated key; the dict has the last value of each."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        keys = [key for key, _ in pairs]
        self.repeated = next(key for key in keys if keys.count(key) > 1)


def read_table(source: str, split: str = "train") -> Iterator[tuple[str, Any]]:
    """(location, row) of each row; the location names the file and a line from 1 (JSON lines, CSV) or a row from 0 (all others).

    JSON numbers are returned as their text in the file, NaN as a float.

    Raises:
        ValueError: the source cannot be read, or has no such split; names the file, and the row where known.
    """
    path = Path(source)
    if path.is_file():
        if split != "train":
            raise ValueError(f"{source} is one file, all of it 'train', and has no part {split!r}")
        return _read_file(path, source)
    if not path.is_dir() and _form_of(source)[0] in _SUFFIXES:
        raise ValueError(f"there is no file {source}")
    return _read_by_datasets(source, split)


def load_table(source: str, config: str | None = None, split: str = "train") -> Any:
    """A `datasets.Dataset` from a folder written by `save_to_disk`, or from anything `load_dataset` accepts.

    Raises:
        ValueError: it cannot be read, or has no such split.
    """
    from datasets import Dataset, load_dataset, load_from_disk

    try:
        if not _is_saved(Path(source)):
            return load_dataset(source, config, split=split)
        table = load_from_disk(source)
    except Exception as error:  # each back end has its own
        raise ValueError(f"{source} cannot be read: {_reason(error)}") from error
    parts = {"train": table} if isinstance(table, Dataset) else dict(table)
    if split not in parts:
        raise ValueError(f"{source} has no part {split!r}: it holds {', '.join(parts)}")
    return parts[split]


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def is_table(folder: Path) -> bool:
    """Whether a folder holds a data set written by `save_to_disk`, or a local copy of a Hub data set in Parquet."""
    return _is_saved(folder) or any(folder.glob("*.parquet")) or any(folder.glob("data/*.parquet"))


def _reason(error: BaseException) -> str:
    """The first line of the root cause of an error, as `datasets` wraps it in one without information."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_by_datasets(source: str, split: str) -> Iterator[tuple[str, Any]]:
    if Path(source).is_dir() and _is_saved(Path(source)):
        yield from _numbered(load_table(source, split=split), source)
        return
    from datasets import DownloadManager, load_dataset_builder
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    try:
        builder = load_dataset_builder(source)
    except Exception as error:
        hub = "neither a file or folder here, nor a data set of the Hub in reach"
        what = "not a folder of data" if Path(source).is_dir() else hub
        raise ValueError(f"{source} is {what}: {_reason(error)}") from error
    files = {str(name): [str(file) for file in found] for name, found in (builder.config.data_files or {}).items()}
    _check_none_left_out(Path(source), files)
    if not isinstance(builder, (Csv, Json)):
        yield from _numbered(load_table(source, split=split), source)
        return
    names = split.split("+")
    if unknown := next((name for name in names if name not in files), None):
        raise ValueError(f"{source} has no part {unknown!r}: it holds {', '.join(files)}")
    for file in (file for name in names for file in files[name]):
        try:
            path = Path(file if Path(file).is_file() else DownloadManager().download(file))
        except Exception as error:
            raise ValueError(f"{file} cannot be fetched: {_reason(error)}") from error
        yield from _read_file(path, file)


def _check_none_left_out(folder: Path, files: dict[str, list[str]]) -> None:
    """Rejects a folder with files of several formats, of which `datasets` would read only one."""
    read = {_form_of(file)[0] for found in files.values() for file in found}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        form = _form_of(path.name)[0]
        if form in _SUFFIXES and form not in read and path.name not in _METADATA and not hidden:
            raise ValueError(f"{folder} holds {path.name} beside files of another form: name the files one by one")


def _form_of(name: str) -> tuple[str, str]:
    """The suffix of a file name, and that of the compression after it, if any."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    packed = suffixes.pop() if suffixes[-1:] and suffixes[-1] in _UNPACKED else ""
    return (suffixes[-1] if suffixes else ""), packed


def _numbered(rows: Iterable[Any], source: str) -> Iterator[tuple[str, Any]]:
    number = -1
    try:
        for number, row in enumerate(rows):
            yield f"{source}, row {number}", row
    except Exception as error:
        raise ValueError(f"{source}, row {number + 1} cannot be read: {_reason(error)}") from error


def _read_file(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """The rows of one file; `name` appears in errors and its suffix decides the format."""
    form, packed = _form_of(name)
    if form in _BUILDERS:
        return _numbered(_load_file(_BUILDERS[form], path, name), name)
    try:
        raw = _UNPACKED[packed](path).read() if packed else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{name} cannot be read: {_reason(error)}") from error
    return _csv_rows(text, name, _DELIMITERS[form]) if form in _DELIMITERS else _json_rows(text, name)


def _load_file(builder: str, path: Path, name: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(builder, data_files=str(path), split="train", streaming=True)  # leaves no copy of the file
    except Exception as error:
        raise ValueError(f"{name} cannot be read as {builder}: {_reason(error)}") from error


def _csv_rows(text: str, name: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Rows of a CSV with every field as text; empty lines are skipped."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            location = f"{name}, line {lines.line_num + 1}"
            try:
                fields = next(lines, None)
            except csv.Error as error:
                raise ValueError(f"{location} is not CSV: {error}") from None
            if fields is None:
                return
            if not header:
                header = fields
                if len(set(header)) < len(header):
                    raise ValueError(f"{name} names a column twice: {', '.join(header)}")
            elif fields and len(fields) != len(header):
                raise ValueError(f"{location} has {len(fields)} fields, the header {len(header)}: {', '.join(header)}")
            elif fields:
                yield location, dict(zip(header, fields))
    finally:
        csv.field_size_limit(limit)


def _json_rows(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """The elements of a list, or a sequence of JSON values with any white space between."""
    at = _after_space(text, 0)
    if text[at : at + 1] == "[":
        yield from _json_elements(text, at, name)
        return
    line, seen = 1, 0
    while at < len(text):
        line, seen = line + text.count("\n", seen, at), at
        value, at = _json_value(text, at, f"{name}, line {line}")
        yield f"{name}, line {line}", value
        at = _after_space(text, at)


def _json_elements(text: str, at: int, name: str) -> Iterator[tuple[str, Any]]:
    at, number = _after_space(text, at + 1), 0
    follows = "]" if text[at : at + 1] == "]" else ","
    while follows == ",":
        value, at = _json_value(text, at, f"{name}, row {number}")
        yield f"{name}, row {number}", value
        at, number = _after_space(text, at), number + 1
        follows = text[at : at + 1]
        at = _after_space(text, at + 1) if follows == "," else at
    if follows != "]":
        raise ValueError(f"{name}, row {number} is not JSON: ',' or ']' is needed, {follows or 'the end'!r} was found")
    if (rest := _after_space(text, at + 1)) < len(text):
        raise ValueError(
            f"{name}: {text[rest : rest + 20]!r} follows after the end of the list, where nothing may stand"
        )


def _json_value(text: str, at: int, location: str) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise ValueError(f"{location} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{location} is nested too deep") from None


def _after_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else RepeatedKeys(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=str, parse_int=str)
