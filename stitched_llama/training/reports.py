"""Logging, and evaluation during a run."""

from typing import Any

from .checks import check_set_to_evaluate
from .data import batches
from .evaluation import evaluate_stitches


class ReportMixin:
    """Logging and evaluation of `StitchTrainer`."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of all passes of a step: three forwards for a stitch that trained, as Transformers counts, one for a teacher."""
        name = self.model.main_input_name
        units = inputs[name].numel() if name == "input_ids" else len(inputs[name])
        return 2 * units * self._macs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean loss of the teacher and of each interval's students since the last log."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in sorted(self._logged.items())}
            self._logged.clear()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", keys: Any = None
    ):
        """Loss and exact match of the anchors and the middle stitch of each interval, or of `keys`.

        Returns `eval_loss` (mean over those stitches) and one entry a stitch and metric; for a dict of data sets
        `eval_{name}_loss` and so on, as `Trainer.evaluate`.

        Raises:
            ValueError: neither `eval_dataset` nor the trainer's is set.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            parts = [self.evaluate(d, ignore_keys, f"{metric_key_prefix}_{name}", keys) for name, d in dataset.items()]
            return {name: value for part in parts for name, value in part.items()}
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if dataset is None:
            raise ValueError("nothing to evaluate on: pass eval_dataset, here or to the trainer")
        check_set_to_evaluate(dataset)
        if keys is None:
            keys = [stitch.key for stitch in self.stitches if stitch.is_anchor or stitch.key in self._middle_keys]
        found = evaluate_stitches(
            self.model,
            batches(
                dataset,
                self._get_collator_with_removed_columns(self.data_collator),
                self.args.per_device_eval_batch_size,
            ),
            keys,
            progress=not self.args.disable_tqdm,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            autocast=self.args.autocast_dtype,
        )
        metrics = {f"{metric_key_prefix}_loss": sum(found["loss"].values()) / len(keys)}
        for name, values in found.items():
            for key, value in values.items():
                metrics[f"{metric_key_prefix}_{name}_stitch_{self.model.space[key].stitch_id}"] = value
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
