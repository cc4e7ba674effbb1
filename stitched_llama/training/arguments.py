"""Arguments of a stitched fine-tune, on top of Transformers' own."""

from dataclasses import dataclass, field
from importlib.util import find_spec

from transformers import TrainingArguments

from stitched_llama.sampling import SCHEMES, SCORES

DISTILLATIONS = ("hard", "soft", "none")


@dataclass
class StitchTrainingArguments(TrainingArguments):
    """`TrainingArguments` with ESTA's choices as defaults (section 5.2), and what is its own."""

    output_dir: str = field(default="runs/alpaca", metadata={"help": "Where checkpoints, table, plot and bundle go."})
    num_train_epochs: float = field(default=10, metadata={"help": "Passes over the data."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak rate of Adam (Alpaca-LoRA's)."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rate."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps, or share of all steps, of warm-up."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Rows a device takes at once."})
    global_batch_size: int = field(
        default=128,
        metadata={"help": "Rows a step, over all devices, by gradient accumulation; 0 leaves that to Transformers."},
    )
    report_to: None | str | list[str] = field(
        default_factory=lambda: "tensorboard" if find_spec("tensorboard") else "none",
        metadata={"help": "Where logs go: tensorboard where it is installed, none, or what Transformers knows."},
    )
    importance: str = field(default="snip_per_loss", metadata={"help": f"Score of a stitch: {', '.join(SCORES)}."})
    sampling: str = field(default="importance", metadata={"help": f"Draw of a stitch: {', '.join(SCHEMES)}."})
    eta: float = field(default=0.9, metadata={"help": "Momentum of the importance averages."})
    interval_count: int = field(default=6, metadata={"help": "Cost intervals to draw from."})
    sampling_warmup: float = field(default=0.1, metadata={"help": "Share of all steps drawn uniformly at first."})
    floor: float = field(default=0.5, metadata={"help": "Share of an interval's draws spread evenly."})
    anchor_share: float = field(default=0.1, metadata={"help": "Share of draws for anchors other than the largest."})
    distillation: str = field(
        default="hard", metadata={"help": f"Student's teacher signal: {', '.join(DISTILLATIONS)}."}
    )
    distillation_weight: float = field(default=0.5, metadata={"help": "Its share of the student's loss."})

    def __post_init__(self):
        if self.distillation not in DISTILLATIONS:
            raise ValueError(
                f"distillation {self.distillation!r} is unknown; one of {', '.join(DISTILLATIONS)} is needed"
            )
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"distillation_weight is {self.distillation_weight}; a share lies in 0..1")
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
