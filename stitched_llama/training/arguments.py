"""Command-line arguments of a stitched fine-tune, in addition to Transformers'."""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from stitched_llama.pst import PSTConfig
from stitched_llama.sampling import SCHEMES, SCORES, Importance
from stitched_llama.space import KEYS

DISTILLATIONS = ("hard", "soft", "none")
ANCHOR_SHARE = 0.67


class _Help(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the description and appends each option's default."""


class _RecipeParser(HfArgumentParser):
    def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Same as `HfArgumentParser`; unknown options and invalid values are command-line errors."""
        try:
            *found, unknown = super().parse_args_into_dataclasses(*args, **kwargs, return_remaining_strings=True)
        except ValueError as error:
            self.error(str(error))
        if unknown:
            self.error(f"unknown arguments: {' '.join(unknown)}")
        return tuple(found)


def recipe_parser(
    arguments: Sequence[type], description: str, usage: str = "--anchors ANCHOR [ANCHOR ...]", epilog: str = KEYS
) -> HfArgumentParser:
    """The command-line parser of a recipe; `--help` begins with the description."""
    return _RecipeParser(
        arguments,
        usage=f"%(prog)s {usage} [options]",
        description=description,
        epilog=epilog,
        formatter_class=_Help,
    )


@dataclass
class PSTArguments:
    """Fields of `PSTConfig` as command-line options."""

    rank: list[int] = field(
        default_factory=lambda: [16], metadata={"help": "LoRA rank: one for all anchors, or one for each."}
    )
    stitch_rank: int = field(
        default=0,
        metadata={
            "help": "Rank of a second LoRA, shared by the stitches and not used by the anchors; anchors then train first. 0: one LoRA for all."
        },
    )
    stitching_rank: str = field(
        default="auto", metadata={"help": "Rank of the update of stitching layers: a number, auto (d1/4), or full."}
    )
    stitch_bias: bool = field(default=True, metadata={"help": "Train a bias for each stitch."})
    full: bool = field(
        default=False, metadata={"help": "Train all weights (SN-Net) instead of LoRA, low-rank updates and biases."}
    )

    def settings(self) -> PSTConfig:
        """The `PSTConfig` for `attach_pst`.

        Raises:
            ValueError: `stitching_rank` is neither a number nor `auto` or `full`.
        """
        named = {"auto": None, "full": "full"}
        if self.stitching_rank not in named and not self.stitching_rank.isdecimal():
            raise ValueError(f"stitching_rank {self.stitching_rank!r} is unknown; a number, 'auto' or 'full' is needed")
        stitching = named[self.stitching_rank] if self.stitching_rank in named else int(self.stitching_rank)
        rank = self.rank[0] if len(self.rank) == 1 else tuple(self.rank)
        return PSTConfig(
            rank=rank,
            stitch_rank=self.stitch_rank,
            stitching_rank=stitching,
            stitch_bias=self.stitch_bias,
            full=self.full,
        )


@dataclass
class StitchTrainingArguments(TrainingArguments):
    """`TrainingArguments` with ESTA's choices as defaults (section 5.2), and options of stitched training.

    Raises:
        ValueError: an unknown name, a share outside 0..1, or batch sizes that contradict each other.
    """

    output_dir: str = field(default="runs/alpaca", metadata={"help": "Where checkpoints, table, plot and bundle go."})
    num_train_epochs: float = field(default=10, metadata={"help": "Passes over the data."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate of AdamW (that of Alpaca-LoRA)."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps, or share of all steps, of warm-up."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Rows in a batch on each device."})
    global_batch_size: int = field(
        default=128,
        metadata={
            "help": "Rows in an optimiser step over all devices, reached by gradient accumulation; 0 leaves gradient_accumulation_steps as given."
        },
    )
    report_to: None | str | list[str] = field(
        default_factory=lambda: "tensorboard" if find_spec("tensorboard") else "none",
        metadata={
            "help": "Where logs go: tensorboard if it is installed, none, or any other integration of Transformers."
        },
    )
    importance: str = field(
        default="excess_loss", metadata={"help": f"Importance score of a stitch: {', '.join(SCORES)}."}
    )
    sampling: str = field(
        default="importance", metadata={"help": f"How the stitch of a step is sampled: {', '.join(SCHEMES)}."}
    )
    eta: float = field(default=0.9, metadata={"help": "Momentum of the importance averages."})
    interval_count: int = field(default=6, metadata={"help": "Cost intervals to sample from."})
    sampling_warmup: float = field(
        default=0.1, metadata={"help": "Share of all steps, at the beginning, sampled uniformly."}
    )
    floor: float = field(default=0.5, metadata={"help": "Share of the samples of an interval that is uniform."})
    anchor_share: float | None = field(
        default=None,
        metadata={
            "help": f"Share of the steps reserved for anchors; by default {ANCHOR_SHARE} with --sampling importance and "
            "without --train_teacher, else 0, as in the papers."
        },
    )
    anchors_first: float = field(
        default=0.6,
        metadata={
            "help": "With --stitch_rank: share of the steps, at the beginning, that train the anchors in turn on labels alone; the rest "
            "train the stitches on the frozen anchors. With 0.6 the run costs about twice what the anchors' own steps cost."
        },
    )
    inplace_teacher: bool = field(
        default=True, metadata={"help": "Distil the drawn stitch from the largest anchor; off as in SN-Net."}
    )
    train_teacher: bool = field(
        default=False, metadata={"help": "Also train the largest anchor at every step, as in ESTA."}
    )
    anchor_lr_scale: float = field(
        default=1.0,
        metadata={
            "help": "Learning rate of the anchors' weights relative to all others (SN-Net: 0.1 for staged families)."
        },
    )
    distillation: str = field(default="hard", metadata={"help": f"Distillation targets: {', '.join(DISTILLATIONS)}."})
    distillation_weight: float = field(default=0.5, metadata={"help": "Weight of distillation in the student's loss."})

    def __getstate__(self) -> dict[str, Any]:
        """The state in `training_args.bin` of a checkpoint, without access tokens."""
        return {name: None if name.endswith("_token") else value for name, value in vars(self).items()}

    def __post_init__(self):
        if self.distillation not in DISTILLATIONS:
            raise ValueError(
                f"distillation {self.distillation!r} is unknown; one of {', '.join(DISTILLATIONS)} is needed"
            )
        if not self.anchor_lr_scale > 0:
            raise ValueError(f"anchor_lr_scale is {self.anchor_lr_scale}; a factor above 0 is needed")
        if self.sampling not in SCHEMES:
            raise ValueError(f"sampling {self.sampling!r} is unknown; one of {', '.join(SCHEMES)} is needed")
        if self.interval_count < 1:
            raise ValueError(f"interval_count is {self.interval_count}; one interval or more is needed")
        Importance(self.importance, self.eta)  # raises for invalid values
        for name in ("distillation_weight", "anchor_share", "anchors_first", "floor", "sampling_warmup"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a share lies in 0..1")
        super().__post_init__()
        if self.global_batch_size:
            asked = self.gradient_accumulation_steps
            rows = self.per_device_train_batch_size * max(1, self.world_size)
            if self.global_batch_size % rows:
                raise ValueError(
                    f"global_batch_size {self.global_batch_size} is no multiple of {rows} "
                    f"({self.per_device_train_batch_size} rows on each of {max(1, self.world_size)} devices): change one"
                )
            self.gradient_accumulation_steps = self.global_batch_size // rows
            if asked not in (1, self.gradient_accumulation_steps):
                raise ValueError(
                    f"gradient_accumulation_steps {asked} and global_batch_size {self.global_batch_size} contradict each "
                    f"other: that batch is {self.gradient_accumulation_steps} times {rows} rows; set --global_batch_size 0 "
                    "to use the former"
                )

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of mixed precision; None without it."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    @property
    def share_of_anchors(self) -> float:
        """`anchor_share`, or its default for these arguments."""
        if self.anchor_share is not None:
            return self.anchor_share
        return ANCHOR_SHARE if self.sampling == "importance" and not self.train_teacher else 0.0

    def importance_score(self, external_teacher: bool = False) -> str:
        """The name of the importance score; it also says where the largest anchor is not the teacher, as the values then differ."""
        if self.inplace_teacher:
            return self.importance
        external = external_teacher and self.importance == "excess_loss"
        return f"{self.importance}, {'outer teacher' if external else 'untaught'}"  # the names that bundles store


@dataclass
class TextDataArguments:
    """Training rows, held-out rows and the prompt template."""

    anchors: list[str] = field(default_factory=list, metadata={"help": "Folders or Hub ids, small to large."})
    data: str = field(
        default="tatsu-lab/alpaca",
        metadata={"help": "A Hub id, a JSON, JSONL, CSV or Parquet file, or a folder of these."},
    )
    train_split: str = field(default="train", metadata={"help": "The part of a Hub data set or folder to train on."})
    eval_data: str | None = field(default=None, metadata={"help": "Held-out rows; by default a random part of --data."})
    eval_split: str = field(default="train", metadata={"help": "The part of --eval_data that is held out."})
    eval_size: int = field(default=500, metadata={"help": "Held-out rows."})
    on_bad_row: str = field(
        default="skip", metadata={"help": "error or skip, for rows without instruction or output (Alpaca has 28)."}
    )
    template: str = field(
        default="auto",
        metadata={
            "help": "Prompt template: alpaca, short, chat (the tokenizer's own), or auto: chat if the tokenizer has one, else alpaca."
        },
    )
    max_length: int = field(default=512, metadata={"help": "Maximum tokens of a row."})


@dataclass
class ImageDataArguments:
    """Anchors, and the images they are tuned on."""

    anchors: list[str] = field(metadata={"help": "Folders or Hub ids, small to large."})
    data: str = field(metadata={"help": "A task's name, a Hub id, an image folder, or a .npz file."})
    train_split: str = field(default="train", metadata={"help": "The part to train on; train+val joins two."})
    eval_split: str = field(default="test", metadata={"help": "The part to evaluate on."})
    eval_size: int = field(default=0, metadata={"help": "Images to evaluate on; 0 is all."})
    shots: int = field(default=0, metadata={"help": "Training images of each class; 0 is all (ESTA: 1, 4, 8, 16)."})
    augment: bool = field(default=True, metadata={"help": "Random crop and flip; off for VTAB-1k."})


@dataclass
class ImageTrainingArguments(StitchTrainingArguments):
    """ESTA's choices for images as defaults (section 5.1, appendix A); the learning rate is `base_lr * batch / 256`.

    Raises:
        ValueError: as `StitchTrainingArguments`, or `learning_rate` is given.
    """

    output_dir: str = field(default="runs/vision", metadata={"help": "Where checkpoints, table, plot and bundle go."})
    num_train_epochs: float = field(default=100, metadata={"help": "Passes over the data."})
    base_lr: float = field(default=1e-3, metadata={"help": "Learning rate at a batch of 256."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images in a batch on each device."})
    global_batch_size: int = field(default=64, metadata={"help": "Images in an optimiser step over all devices."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or share of all steps, of warm-up."})
    interval_count: int = field(default=15, metadata={"help": "Cost intervals to sample from."})

    def __post_init__(self):
        super().__post_init__()
        images = self.per_device_train_batch_size * self.gradient_accumulation_steps * max(1, self.world_size)
        rate = self.base_lr * images / 256
        if self.learning_rate not in (StitchTrainingArguments.learning_rate, rate):
            raise ValueError(
                f"learning_rate {self.learning_rate} would be lost, it follows from base_lr and the batch here ({rate:g}): "
                "pass --base_lr (the rate at a batch of 256)"
            )
        self.learning_rate = rate
