"""Reads an anchor's `config.json` from a folder or from the Hub; downloads no weights, runs no code."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def fields_of(config: Any) -> Mapping[str, Any]:
    """The fields of a configuration: of a folder or Hub id, of an object of Transformers, or themselves."""
    if isinstance(config, (str, os.PathLike)):
        return read_config(os.fspath(config))
    return config if isinstance(config, Mapping) else config.to_dict()


def read_config(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """The fields of `config.json` of a local folder (or file) or of a Hub repository.

    Raises:
        ValueError: no such folder or repository, no `config.json` in it, or it is not JSON.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ValueError(f"{name_or_path} holds no config.json: is it a folder written by save_pretrained?")
    elif not path.is_file():
        path = _download_config(name_or_path, revision)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__} where a config.json holds an object")
    return config


def _download_config(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{repo_id!r} is neither a folder here nor a repository of the Hub in reach: {first_line(error)}"
        ) from None


def first_line(error: BaseException) -> str:
    """What an error says, in a line: of those of other libraries, which go on for many."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
