"""A trainer's checkpoints: each is a bundle with the settings of its run, complete once its digests are written."""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from stitched_llama.bundles import DIGESTS, WEIGHTS, Bundle, read_digests, sha256, verify_digests, write_digests
from stitched_llama.space import StitchTable

from .checks import check_checkpoint
from .finite import check_weights
from .settings import SETTINGS, check_settings, run_settings, write_settings

logger = logging.getLogger(__name__)
_STATE, _RESULT = "trainer_state.json", "result.json"
_WITHOUT = "it was saved without"
_NEEDED = (SETTINGS, _STATE, "optimizer.pt", "scheduler.pt")


def find_checkpoint(
    resume: str | None, output_dir: str, settings: Mapping[str, Any] | None = None, bundles: bool = True
) -> str | None:
    """The checkpoint to resume from: `auto` is the newest complete one in `output_dir`, if any; else a path.

    Logs which one is used and why newer ones are not.

    Args:
        settings: of this run, from `run_settings`; the checkpoint's must be the same.
        bundles: whether each checkpoint is a bundle; False for other trainers' checkpoints.

    Raises:
        ValueError: the path holds no complete checkpoint or one with other settings, or `output_dir` holds only checkpoints without
            optimiser state.
    """
    if resume in (None, "", "no"):
        return None
    checkpoint = _newest(output_dir, bundles) if resume == "auto" else resume
    if resume != "auto" and (reason := why_not_whole(Path(resume), bundles)) is not None:
        raise ValueError(f"{resume} holds no whole checkpoint: {reason}; name another, or 'auto'")
    check_settings(checkpoint, settings or {})
    return checkpoint


def _newest(output_dir: str, bundles: bool) -> str | None:
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()]
    skipped = []
    for path in sorted(folders, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if (reason := why_not_whole(path, bundles)) is None:
            _log(f"resume: {path} is taken" + "".join(f"; {other} is passed over: {why}" for other, why in skipped))
            return str(path)
        skipped.append((path, reason))
    reasons = "; ".join(f"{path}: {why}" for path, why in skipped)
    if any(why.startswith(_WITHOUT) for _, why in skipped):
        raise ValueError(
            f"none of the checkpoints in {output_dir} can be resumed, and a run from the beginning would write over them: {reasons}; "
            "begin in another output_dir, or resume 'no' to write over them"
        )
    _log(
        f"resume: no whole checkpoint in {output_dir}, the run begins with step 1" + (f"; {reasons}" if reasons else "")
    )
    return None


def why_not_whole(path: Path, bundles: bool = True) -> str | None:
    """Why a run cannot resume from there; None if it can. Reads all files once."""
    if not path.is_dir():
        return "it is no folder"
    if _is_unfinished(path):
        return "its save was cut short"
    try:
        verify_digests(path)
        recorded = read_digests(path)
        missing = [name for name in (*_NEEDED, WEIGHTS) if name not in recorded]
        missing += [] if any(name.startswith("rng_state") for name in recorded) else ["rng_state.pth"]
        if missing:
            return f"{_WITHOUT} {', '.join(missing)} (save_only_model)"
        int(json.loads((path / _STATE).read_text(encoding="utf-8"))["global_step"])
        if bundles:
            Bundle.open(path)
    except (ValueError, OSError, KeyError, TypeError) as error:
        return str(error).split(";")[0]
    return None


def _is_unfinished(path: Path) -> bool:
    """Whether the save there was interrupted. The digests of the bundle alone may have been written."""
    try:
        recorded = read_digests(path) if (path / DIGESTS).is_file() else {}
    except ValueError:
        return False  # damaged: digests are written in one step
    return _STATE not in recorded and ((path / SETTINGS).is_file() or not (path / _STATE).is_file())


def _log(text: str) -> None:
    """Logs on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s", text)


def is_published(checkpoint: str | None, output: Path, anchors: Sequence[str]) -> bool:
    """Whether `output` holds the bundle and result of a finished run of a recipe, for these anchors and this last checkpoint."""
    bundle, result = output / "bundle" / WEIGHTS, output / _RESULT
    if checkpoint is None or not _is_finished(_state(checkpoint)) or not (bundle.is_file() and result.is_file()):
        return False
    if result.stat().st_mtime_ns < bundle.stat().st_mtime_ns or sha256(bundle) != sha256(Path(checkpoint) / WEIGHTS):
        return False
    try:
        row = json.loads(result.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # an interrupted write
        return False
    if not isinstance(row, dict) or row.get("anchors") != list(anchors) or row.get("samples", ()) is None:
        return False
    _log(f"{checkpoint} is the end of its run, {bundle.parent} and {result} are of it: nothing to do")
    return True


def _state(checkpoint: str) -> TrainerState:
    return TrainerState.load_from_json(os.path.join(checkpoint, _STATE))


def _is_finished(state: TrainerState) -> bool:
    return 0 < state.max_steps <= state.global_step


def begin_checkpoint(folder: Path, settings: Mapping[str, Any]) -> None:
    """Creates a folder that holds only the settings of the run; the checkpoint is incomplete until its digests are written."""
    for name in (
        DIGESTS,
        _STATE,
    ):  # of an earlier run; removed first, so that an interruption leaves no complete checkpoint
        (folder / name).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_settings(folder, settings)


class CheckpointMixin:
    """Saving and resuming of `StitchTrainer`: a checkpoint is a bundle."""

    saves_bundles = True

    def settings(self) -> dict[str, Any]:
        """The settings that decide rows and steps, as stored in each checkpoint."""
        rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        own = {"training_rows": rows, "rows_digest": getattr(self.train_dataset, "digest", None)}
        own["anchor_dtypes"] = [
            f"{a.dtype}{' 8bit' * bool(getattr(a, 'is_loaded_in_8bit', False))}" for a in self.model.anchors
        ]
        return run_settings(self.args, own, self.data_settings or {})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves a bundle, with the importance averages needed to resume.

        Raises:
            ValueError: a weight is not finite.
        """
        check_weights(self.model, self.state.global_step)
        self.save_importance()
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Same as `Trainer._save_checkpoint`, with `settings` and finally digests of all files; older checkpoints are removed after
        that."""
        check_weights(self.model, self.state.global_step)
        home = self._get_output_dir(trial)
        folder, writes, limit = (
            Path(home) / f"checkpoint-{self.state.global_step}",
            self.args.should_save,
            self.args.save_total_limit,
        )
        if writes:
            begin_checkpoint(folder, self.settings())
        self.accelerator.wait_for_everyone()
        self.args.save_total_limit = None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each rank writes a file there
        if writes:
            write_digests(folder, [path.name for path in folder.iterdir() if path.is_file() and path.name != DIGESTS])
            rotate_checkpoints(home, limit, self.state.best_model_checkpoint, use_mtime=True)

    def save_importance(self) -> None:
        """Writes the importance averages into the model's table."""
        self.model.table = replace(
            self.model.table,
            importance=dict(self.importance.averages),
            visits=dict(self.importance.visits),
            importance_score=self.importance_score,
            interval_count=self.args.interval_count,
        )

    def _checkpoint_of(self, resume: str | bool | None) -> str | None:
        """The complete checkpoint to resume from, by path or as the newest in `output_dir`; None for a new run.

        Raises:
            ValueError: there is none, it is of another run, or the order of rows cannot be reproduced.
        """
        if not resume:
            return None
        resume = "auto" if resume is True else os.fspath(resume)
        checkpoint = find_checkpoint(resume, self.args.output_dir, self.settings(), self.saves_bundles)
        if checkpoint is None:
            raise ValueError(f"there is no checkpoint to resume from in {self.args.output_dir}: begin without")
        if (
            self.args.train_sampling_strategy == "group_by_length"
            or not self.args.accelerator_config.use_seedable_sampler
        ):
            raise ValueError(
                "rows grouped by length (train_sampling_strategy), or drawn without use_seedable_sampler, come in another order "
                "after a resume: start a new run, or use train_sampling_strategy random"
            )
        return checkpoint

    def _finished(self, checkpoint: str | None) -> TrainOutput | None:
        """The result of a finished run, without training or saving anything; None if steps are left."""
        if checkpoint is None or not _is_finished(state := _state(checkpoint)):
            return None
        _log(f"{checkpoint} is the end of its run of {state.max_steps} steps: nothing is left to train")
        self._load_from_checkpoint(checkpoint)
        if not hasattr(self.model, "_original_forward"):  # mixed precision, also used to evaluate a trained model
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        return TrainOutput(state.global_step, losses[-1] if losses else math.nan, {"train_runtime": 0.0})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restores the tensors of the checkpoint's bundle and the importance averages, all of them or none."""
        bundle = Bundle.open(resume_from_checkpoint)
        check_checkpoint(bundle, resume_from_checkpoint, self.model, self.importance_score)
        self.model.load_bundle(bundle)
        table = StitchTable.from_dict(bundle.table)
        self.importance.averages, self.importance.visits = dict(table.importance), dict(table.visits)

    def _load_best_model(self) -> None:
        self.model.load_bundle(Bundle.open(self.state.best_model_checkpoint))
