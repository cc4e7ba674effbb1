"""The settings of a run, stored in each of its checkpoints; a run is resumed only with the same settings."""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

SETTINGS = "run.json"

# Settings that may differ when a run is resumed, as they change neither its rows nor its steps. Everything else must be the same.
# Paths of anchors may differ; their weights are compared.
MAY_CHANGE = frozenset(
    """
    anchors resume baselines budgets smoke
    output_dir resume_from_checkpoint ignore_data_skip local_rank do_train do_eval do_predict debug skip_memory_metrics
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica
    disable_tqdm report_to run_name project include_num_input_tokens_seen
    trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
    per_device_eval_batch_size prediction_loss_only include_for_metrics batch_eval_metrics
    save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint
    restore_callback_states_from_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_empty_cache_steps
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context
    ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    """.split()
)


def run_settings(args: Any, *others: Any) -> dict[str, Any]:
    """The settings that decide a run's rows and steps, by option name, as JSON values.

    Args:
        args: the training arguments.
        others: dataclasses or mappings of further settings, for example of the data and the space.
    """
    settings = {**args.to_dict(), "world_size": max(1, args.world_size)}
    for other in others:
        settings |= asdict(other) if is_dataclass(other) else other
    return json.loads(json.dumps({k: v for k, v in settings.items() if k not in MAY_CHANGE}, default=str))


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    (folder / SETTINGS).write_text(json.dumps(dict(settings), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def check_settings(checkpoint: str | None, settings: Mapping[str, Any]) -> None:
    """Rejects a checkpoint of a run with other settings.

    Args:
        settings: from `run_settings`, or some of them.

    Raises:
        ValueError: names each setting that differs and both values.
    """
    if checkpoint is None:
        return
    began = json.loads((Path(checkpoint) / SETTINGS).read_text(encoding="utf-8"))
    differ = [
        f"--{name} {began[name]} there, {value} here"
        for name, value in settings.items()
        if name in began and began[name] != value
    ]
    if differ:
        raise ValueError(
            f"{checkpoint} began with other settings: {'; '.join(differ)}. Resume with the same, or begin in another output_dir; what "
            "is logged, evaluated or saved in the run may differ"
        )
