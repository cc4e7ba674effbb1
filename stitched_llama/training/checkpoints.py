"""Which checkpoint to resume from, and whether it saw the same rows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stitched_llama.bundles import Bundle, write_atomically

_STATE, _SETTINGS = "trainer_state.json", "data.json"


def find_checkpoint(resume: str | None, output_dir: str) -> str | None:
    """The checkpoint to resume from: `auto` is the newest whole one in `output_dir`, if any; else a path.

    Raises:
        ValueError: the path holds no whole checkpoint.
    """
    if resume in (None, "", "no"):
        return None
    if resume == "auto":
        found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()]
        whole = [path for path in found if _is_whole(path)]
        return str(max(whole, key=lambda path: int(path.name.split("-")[-1]))) if whole else None
    if not _is_whole(Path(resume)):
        raise ValueError(
            f"{resume} holds no whole checkpoint (a bundle and trainer_state.json): name another, or 'auto'"
        )
    return resume


def begin_checkpoint(folder: Path, settings: Mapping[str, Any] | None) -> None:
    """Prepares the folder of a checkpoint about to be saved: it holds no whole one until the last file is there, and from the
    start what decides which rows train and which are held out.
    """
    (folder / _STATE).unlink(missing_ok=True)  # of another run
    (folder / _SETTINGS).unlink(missing_ok=True)
    if settings is not None:
        write_atomically(
            folder / _SETTINGS, lambda temporary: temporary.write_text(json.dumps(dict(settings), indent=1) + "\n")
        )


def check_data_settings(checkpoint: str | None, settings: Mapping[str, Any] | None) -> None:
    """Refuses to go on from a checkpoint of other rows: the run would be judged on some that it has trained on.

    Raises:
        ValueError: the run that left `checkpoint` had other settings; names the first.
    """
    if checkpoint is None or settings is None or not (path := Path(checkpoint) / _SETTINGS).is_file():
        return
    began = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if began.get(name) != value:
            raise ValueError(
                f"{checkpoint} began with --{name} {began.get(name)}, this run has {value}: held-out rows would be others; "
                "resume with the same, or in another output_dir"
            )


def _is_whole(path: Path) -> bool:
    try:
        Bundle.open(path)
    except (ValueError, OSError):
        return False
    return (path / _STATE).is_file() and (path / "optimizer.pt").is_file()
