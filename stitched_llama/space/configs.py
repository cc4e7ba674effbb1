"""Reads an anchor's `config.json` from a folder or from the Hub; downloads no weights, runs no code."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .text import first_line


def fields_of(config: Any) -> Mapping[str, Any]:
    """The fields of a configuration given as a folder, a Hub id, a configuration of Transformers, or a mapping."""
    if isinstance(config, (str, os.PathLike)):
        return read_config(os.fspath(config))
    return config if isinstance(config, Mapping) else config.to_dict()


def read_config(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """The fields of `config.json` of a local folder (or file) or of a Hub repository.

    Raises:
        ValueError: no such folder or repository, no `config.json` in it, or it is not JSON.
    """
    try:
        path = Path(name_or_path).expanduser()
    except RuntimeError as error:  # no home of that user
        raise ValueError(f"{name_or_path!r} is no path here: {first_line(error)}") from None
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ValueError(f"{name_or_path} holds no config.json: is it a folder written by save_pretrained?")
    elif not path.is_file():
        path = _download_config(name_or_path, revision)
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ValueError: it is not JSON, nested too deeply, or no object; names the file.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError too
        raise ValueError(f"{path} is not JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where an object is needed")
    return content


def _download_config(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{repo_id!r} is neither a folder here nor a repository of the Hub in reach: {first_line(error)}"
        ) from None
