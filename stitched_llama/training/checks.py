"""Checks before a run starts, and of each batch."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from stitched_llama.bundles import Bundle
from stitched_llama.models.processors import normalization, same_normalization
from stitched_llama.pst import PSTConfig
from stitched_llama.space import ANY_SIZE, SPACE_OPTIONS, StitchSpace

from .data import IGNORED, batches

# Environment flags by which `accelerate launch` requests a way of splitting a model; on a CPU Accelerate ignores them silently.
_SPLITTING_FLAGS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}
_PLAIN_DDP = (
    "FSDP, DeepSpeed and other ways to split a model are not supported, the trained parts are small: leave it off and use plain "
    "DDP (`accelerate launch --multi_gpu`)"
)


def check_arguments(args: Any) -> None:
    """Rejects an unsupported way of training, from the arguments alone.

    Raises:
        ValueError: names the setting, its value and the fix.
    """
    check_launch(args)
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices is off: ranks would weigh their tokens differently, switch it on"
        )
    if args.train_teacher and not args.inplace_teacher:
        raise ValueError(
            "train_teacher is on and inplace_teacher off: the teacher would train without being used for distillation, drop one"
        )
    if args.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor {args.label_smoothing_factor} is not supported: leave it 0")
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"neftune_noise_alpha {args.neftune_noise_alpha} is not supported, one anchor's embedding alone would get the noise: "
            "leave it None"
        )
    if args.push_to_hub:
        raise ValueError(
            "push_to_hub is not supported, a checkpoint would be uploaded without its stitches.json: leave it off and call "
            "trainer.save_importance() and model.push_to_hub(repo_id) after the run"
        )


def check_launch(args: Any) -> None:
    """Refuses a way of spreading or interrupting a run that is not supported, whatever trains.

    Raises:
        ValueError: names the setting and the fix.
    """
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs in one process: start with `accelerate launch`, one process each")
    asked = [name for name in ("fsdp", "fsdp_config", "deepspeed", "parallelism_config") if getattr(args, name)]
    asked += [f"{name} by `accelerate launch`" for flag, name in _SPLITTING_FLAGS.items() if parse_flag_from_env(flag)]
    if asked:
        raise ValueError(f"{asked[0]} is asked for: {_PLAIN_DDP}")
    if args.enable_jit_checkpoint:
        raise ValueError(
            "enable_jit_checkpoint is not needed, SIGTERM ends a run with a checkpoint anyway: leave it off"
        )


def check_run(trainer: Any, teacher: Any) -> None:
    """Rejects an unsupported way of training, from the arguments and the model.

    Raises:
        ValueError: names the setting, its value and the fix.
    """
    args, model = trainer.args, trainer.model
    check_arguments(args)
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if getattr(trainer, name) is not None:
            raise ValueError(
                f"{name} is given and would not be called, a step has its own loss and an evaluation its own scores of several "
                "stitches: leave it out, and score model.pinned(stitch_id) yourself"
            )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(_PLAIN_DDP)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "nothing of this model trains: call model.attach_pst(PSTConfig(...)) before you make a trainer; one whose PST was merged "
            "is loaded anew, without merge"
        )
    if args.device.type == "cpu" and any(getattr(anchor, "is_loaded_in_4bit", False) for anchor in model.anchors):
        raise ValueError(
            "anchors in 4 bits cannot be trained on a CPU (bitsandbytes): load them in 8 bits, or use a GPU"
        )
    if model.space.anchor_stitch(-1).key not in model.keys:
        raise ValueError("the largest anchor is the teacher and was not loaded: load the whole bundle to train it")
    if args.anchor_lr_scale != 1 and not (model.config.pst is not None and model.config.pst_config.full):
        raise ValueError(
            f"anchor_lr_scale {args.anchor_lr_scale} is for anchors that train whole (PSTConfig(full=True)); these are frozen"
        )
    kind = getattr(model.config, "problem_type", None)
    if kind is None and model.main_input_name == "pixel_values" and model.config.num_labels == 1:
        kind = "regression"  # Transformers' default for one label
    if kind not in (None, "single_label_classification"):
        raise ValueError(
            f"problem_type is {kind!r}: only one class an image is trained here; for other targets take transformers.Trainer, "
            "which uses the model's own loss"
        )
    evaluated = (
        trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval_dataset": trainer.eval_dataset}
    )
    for name, dataset in evaluated.items():
        if dataset is not None:
            check_set_to_evaluate(dataset, name)
    if teacher is not None:
        check_teacher(model.config, teacher.config, args)


def check_batch(batch: Mapping[str, Any], images: bool) -> None:
    """Rejects a batch that cannot be trained or evaluated on.

    Raises:
        ValueError: a column is not a tensor, labels are missing, or are not one class a token or image.
    """
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"a batch has the column {name!r}, a {type(value).__name__}: leave it out of the rows or in the data collator, "
                "a model takes tensors"
            )
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(f"no labels: a batch holds {', '.join(batch)} only")
    shape = [len(next(iter(batch.values())))] if images else list(batch.get("input_ids", labels).shape)
    if labels.is_floating_point() or labels.dtype == torch.bool or list(labels.shape) != shape:
        raise ValueError(
            f"labels are {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}: integers {shape}, one class "
            f"{'an image' if images else 'a token'}, are what is trained on here; for targets of several classes (multi-label, "
            "mixup) take transformers.Trainer, which uses the model's own loss"
        )


def check_set_to_evaluate(dataset: Any, name: str = "eval_dataset") -> None:
    """Rejects a stream: every stitch is evaluated on the whole data set.

    Raises:
        ValueError: the data set has no length or is iterable only.
    """
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}, a stream: every stitch is evaluated on all of it, so pass a part of it that has "
            "a length, such as list(stream.take(500))"
        )


def check_sets(trainer: Any) -> None:
    """Checks the first batch of each data set, and that the training set has at least one label.

    Raises:
        ValueError: as `check_batch`, or all labels of the training set are masked.
    """
    images = trainer.model.main_input_name == "pixel_values"
    collator = trainer._get_collator_with_removed_columns(trainer.data_collator)
    train, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    if train is not None and hasattr(train, "__len__") and not isinstance(train, torch.utils.data.IterableDataset):
        parts = iter(batches(train, collator, size))
        if (first := next(parts, None)) is None:
            raise ValueError("the training set is empty")
        check_batch(first, images)
        labelled = (part["labels"] if images else part["labels"][:, 1:] for part in chain([first], parts))
        if not any((labels != IGNORED).any() for labels in labelled):
            raise ValueError(
                f"no label of the {len(train)} training rows is one to learn, all are {IGNORED} (masked): the data collator or the "
                "tokenisation leaves no response"
            )
    evaluated = trainer.eval_dataset if trainer.args.eval_strategy != "no" else None
    for dataset in evaluated.values() if isinstance(evaluated, dict) else [evaluated]:
        if dataset is not None:
            check_batch(next(iter(batches(dataset, collator, trainer.args.per_device_eval_batch_size))), images)


def check_teacher(student: Any, teacher: Any, args: Any) -> None:
    """Rejects an external teacher whose logits do not match the student's, from both configurations.

    Raises:
        ValueError: other classes, other class names, another image size, or distillation is off.
    """
    if args.distillation == "none" or args.distillation_weight == 0:
        raise ValueError(
            f"a teacher is given and distillation is {args.distillation!r} with weight {args.distillation_weight}: it would "
            "have no effect; leave one out"
        )
    sizes = [getattr(config, "vocab_size", None) or config.num_labels for config in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the teacher has {sizes[1]} classes, the stitched model {sizes[0]}: they must be the same")
    if not hasattr(student, "image_size"):
        return
    size = getattr(teacher, "image_size", None)
    if size is not None and size != student.image_size and teacher.model_type not in ANY_SIZE:
        raise ValueError(
            f"the teacher takes images of {size}, the stitched model of {student.image_size}: take one of that size"
        )
    for number, name in student.id2label.items():
        other = teacher.id2label.get(number)
        if other != name and other != f"LABEL_{number}" and name != f"LABEL_{number}":
            raise ValueError(
                f"class {number} is {name!r} here and {other!r} for the teacher: train it on the same classes"
            )


def check_teacher_images(student: Any, teacher: Any) -> None:
    """Rejects an external teacher with another image normalisation than the anchors: both receive the same pixel values.

    Raises:
        ValueError: names both.
    """
    own = next((scale for scale in reversed(student.normalization or []) if scale is not None), None)
    other = normalization(teacher.name_or_path) if teacher.name_or_path else None
    if not same_normalization(own, other):
        raise ValueError(
            f"the teacher {teacher.name_or_path} takes images normalised by {other}, the stitched model by {own}: take a teacher of "
            "the same, or tune it on the anchors' first (recipes/vision_baseline.py --save)"
        )


def _expanded(pst: Any, space: StitchSpace) -> Any:
    """PST settings with one rank an anchor, so that one rank for all compares equal to a list of it."""
    return pst and pst | {"rank": list(PSTConfig.from_dict(pst).ranks(space))}


def check_checkpoint(bundle: Bundle, path: str, model: Any, importance_score: str) -> None:
    """Rejects a checkpoint of another run.

    Raises:
        ValueError: another space, other weights of an anchor, other PST settings or another importance score; names both.
    """
    ending = "resume with the options it began with, or in another output_dir"
    if bundle.table["space_digest"] != model.space.digest:
        pairs = {name: (bundle.config.get(name), getattr(model.config, name)) for name in SPACE_OPTIONS}
        differ = [f"{name} {there!r} there, {here!r} here" for name, (there, here) in pairs.items() if there != here]
        raise ValueError(f"{path} is of another space: {', '.join(differ) or 'other anchors or classes'}; {ending}")
    for index, (there, here) in enumerate(zip(bundle.config.get("anchors") or (), model.config.anchors or ())):
        for part, digest in here["fingerprint"].items():
            if digest != (began := there["fingerprint"].get(part)):
                raise ValueError(
                    f"{path} began on anchor {index} of {there['name_or_path']}, this run has that of {here['name_or_path']}: "
                    f"{part} had the digest {began} and has {digest}; resume with the anchors it began with, or in another output_dir"
                )
    saved, wanted = bundle.config.get("pst"), model.config.pst
    if _expanded(saved, model.space) != _expanded(wanted, model.space):
        raise ValueError(f"{path} has the PST settings {saved}, this run has {wanted}: {ending}")
    score = bundle.table.get("importance_score")
    if score != importance_score:
        raise ValueError(
            f"{path} averaged the importance {score!r}, this run wants {importance_score!r}: resume "
            "with the same --importance, --inplace_teacher and --teacher"
        )
