"""Which checkpoint to resume from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stitched_llama.bundles import Bundle, write_atomically


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


def keep_data_settings(
    output_dir: str, settings: Mapping[str, Any], checkpoint: str | None, write: bool = True
) -> None:
    """Writes what decides which rows train and which are held out beside the checkpoints; with others a resumed run would be
    judged on rows that it has trained on.

    Raises:
        ValueError: the run of `checkpoint` had other settings; names the first.
    """
    path = (Path(output_dir) if checkpoint is None else Path(checkpoint).parent) / "data.json"
    if checkpoint is not None and path.is_file():
        began = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if began.get(name) != value:
                raise ValueError(
                    f"{checkpoint} began with --{name} {began.get(name)}, this run has {value}: held-out rows would be others; "
                    "resume with the same, or in another output_dir"
                )
    elif write:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            path, lambda temporary: Path(temporary).write_text(json.dumps(dict(settings), indent=1) + "\n")
        )


def _is_whole(path: Path) -> bool:
    try:
        Bundle.open(path)
    except (ValueError, OSError):
        return False
    return (path / "trainer_state.json").is_file() and (path / "optimizer.pt").is_file()
