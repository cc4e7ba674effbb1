"""Which checkpoint to resume from."""

from pathlib import Path

from stitched_llama.bundles import Bundle


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


def _is_whole(path: Path) -> bool:
    try:
        Bundle.open(path)
    except (ValueError, OSError):
        return False
    return (path / "trainer_state.json").is_file() and (path / "optimizer.pt").is_file()
