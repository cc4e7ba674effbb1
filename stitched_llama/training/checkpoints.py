"""A trainer's checkpoints: each a bundle that says which rows its run trained on."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from stitched_llama.bundles import Bundle, write_atomically
from stitched_llama.space import StitchTable

from .checks import check_checkpoint

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


class CheckpointMixin:
    """How a `Trainer` saves and loads bundles."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves a bundle, with the importance averages that resuming needs."""
        self.save_importance()
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Transformers has it, with `data_settings`."""
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            begin_checkpoint(folder, self.data_settings)
        super()._save_checkpoint(model, trial)

    def save_importance(self) -> None:
        """Writes the importance averages into the model's table."""
        self.model.table = replace(
            self.model.table,
            importance=dict(self.importance.averages),
            visits=dict(self.importance.visits),
            importance_score=self.rating,
            interval_count=self.args.interval_count,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """A checkpoint is a bundle: its tensors, and the importance averages, come back whole or not at all."""
        bundle = Bundle.open(resume_from_checkpoint)
        check_checkpoint(bundle, resume_from_checkpoint, self.model, self.rating)
        check_data_settings(resume_from_checkpoint, self.data_settings)
        self.model.load_bundle(bundle)
        table = StitchTable.from_dict(bundle.table)
        self.importance.averages, self.importance.visits = dict(table.importance), dict(table.visits)

    def _load_best_model(self) -> None:
        self.model.load_bundle(Bundle.open(self.state.best_model_checkpoint))
