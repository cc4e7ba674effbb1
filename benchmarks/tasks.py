"""What the evidence is measured on: the description of a run, and the two tasks with their anchors and data."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "data" / "anchors"


@dataclass(frozen=True)
class Run:
    """What one run does.

    Attributes:
        name: of the setting, equal over seeds.
        space, pst, training: options of `StitchSpace`, `PSTConfig` and `StitchTrainingArguments` unlike the task's own.
        kind: `"stitched"`; `"untrained"`, the same without any training; or `"alone"`: each anchor by plain PEFT LoRA, or whole
            where `pst` says `full`.
        family: anchors other than the task's first family.
        init: start of the stitching layers: `"joint"`, `"mean"` (both least squares) or `"kaiming"`.
        ridge: of the least squares, relative to the mean variance of the features.
        align: steps of the alignment stage of `calibrate`.
        adapted: name of an `alone` run of this seed whose tuned anchors are stitched: adapt-then-stitch.
        peer: what trains instead of LoRA or the biases (`peers.py`).
        part: of the task's data: `"source"`, what the anchors were pretrained on (vision); all for `""`.
        shots: pictures a class (vision); 0 is the task's own.
        angles: also the pairwise gradient angles between stitches at the end.
        hits: also which held-out rows each stitch got right.
        lasts: names of runs of this seed; this one takes as many steps as fit into their seconds.
        rate_of: the run whose seconds a step tell how many those are.
    """

    task: str
    name: str
    seed: int
    space: dict = field(default_factory=dict)
    pst: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    kind: str = "stitched"
    family: str = ""
    init: str = "joint"
    ridge: float = 1e-4
    align: int = 0
    adapted: str | None = None
    peer: str = ""
    part: str = ""
    shots: int = 0
    angles: bool = False
    hits: bool = False
    lasts: tuple[str, ...] = ()
    rate_of: str = ""


class Vision:
    """Anchors of scikit-learn's digits 0 to 6 (`data/make_vits.py`, a family of its own for each seed), adapted to all ten."""

    metric, trainer = "accuracy", "StitchImageTrainer"
    head = ["classifier"]
    steps = 900
    training = {
        "per_device_train_batch_size": 32, "global_batch_size": 32, "learning_rate": 5e-3, "weight_decay": 1e-4,
        "warmup_steps": 0.1, "interval_count": 15,
    }  # fmt: skip
    full_rate = 1e-3
    # model, anchors, options of the space
    families = {
        "": ("ViT", ("tiny", "small", "base"), {"kernel_size": 2}),
        "convnext": ("ConvNext", ("small", "base"), {"kernel_size": 2}),
        "resnet-swin": ("Mixed", ("small", "base"), {"across_stages": True}),
    }
    ranks = {"": (32, 16, 8), "convnext": 8, "resnet-swin": 8}  # of LoRA; the ViTs' are the paper's
    made = {
        "": "ViTs of 6 blocks, 32, 64 and 128 wide",
        "convnext": "ConvNeXts of two stages, 16-32 and 32-64 wide",
        "resnet-swin": "a ResNet of three stages, 16-32-64 wide, and a Swin of three, 24-48-96 wide",
    }
    trained = "600 steps of 64 pictures of the digits 0 to 6, each anchor apart from the others; one family a seed"

    def __init__(self, cache: Path, run: Run):
        from transformers import AutoImageProcessor

        from stitched_llama.training import ImageSet, collate_images, few_shot, read_images
        from stitched_llama.training.images import Images

        self.folder, self.collate = self.place(cache, run.family, run.seed), collate_images
        kind, names, self.space = self.families[run.family]
        self.rank = self.ranks[run.family]
        self.model_class = f"Stitched{kind}ForImageClassification"
        self.anchors = [str(self.folder / "anchors" / name) for name in names]
        self.processor = processor = AutoImageProcessor.from_pretrained(
            self.anchors[-1], use_fast=False, trust_remote_code=False
        )
        parts = [read_images(str(self.folder / "digits.npz"), part) for part in ("train", "test")]
        if run.part == "source":
            kept = [[i for i, label in enumerate(part.labels) if label < 7] for part in parts]
            parts = [
                Images([p.pictures[i] for i in own], [p.labels[i] for i in own], p.names[:7])
                for p, own in zip(parts, kept)
            ]
        train, test = parts
        train = train if run.part == "source" else few_shot(train, run.shots or 10, run.seed)
        self.names, self.train, self.test = train.names, ImageSet(train, processor), ImageSet(test, processor)

    @staticmethod
    def place(cache: Path, family: str, seed: int) -> Path:
        """The folder of a family's anchors."""
        return cache / f"{family or 'vision'}-{seed}"

    @classmethod
    def prepare(cls, cache: Path, family: str, seed: int) -> None:
        """Makes the anchors that are not there yet."""
        folder = cls.place(cache, family, seed)
        if not folder.is_dir():
            _python("data/make_vits.py", "--seed", 10 * seed, "--family", family or "vit", output=folder)

    def model(self, anchors: list[str], space: dict) -> Any:
        import stitched_llama as sl

        options = {**self.space, **space, "id2label": dict(enumerate(self.names))}
        model = getattr(sl, self.model_class).from_anchors(anchors, **options)
        model.config.train_head = len(self.names) != 7  # the anchors' own heads know what they were pretrained on
        return model

    def calibration(self) -> Iterator[dict]:
        import torch

        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))[:100].tolist()
        for first in range(0, len(order), 10):
            yield {"pixel_values": self.train.pixels[order[first : first + 10]]}

    def plain(self, anchor: str) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification.from_pretrained(
            anchor, ignore_mismatched_sizes=True, trust_remote_code=False, id2label=dict(enumerate(self.names))
        )


class Language:
    """Two byte-level LLaMAs, fine-tuned on 24 instruction skills (`data/skills.py`).

    Every seed of a fine-tune starts from the same anchors.
    """

    metric, trainer = "exact_match", "StitchTrainer"
    head: list[str] = []
    ranks = {"": 32, "second": 32, "apart": 32}
    space: dict = {}
    steps = 900
    training = {
        "per_device_train_batch_size": 16, "global_batch_size": 16, "learning_rate": 6e-3, "weight_decay": 1e-4,
        "warmup_steps": 0.06, "interval_count": 6,
    }  # fmt: skip
    full_rate = 1e-3
    made = {
        "": "the demo's pair (data/anchors), 128 and 76 wide, 9 and 7 blocks; the small one cut from the large and aligned to it",
        "second": "such a pair of another seed, 1,000 and 500 steps instead of 3,000 and 1,500",
        "apart": "the demo's large one, and a small one of its shape trained by itself, neither cut nor aligned",
    }
    trained = "steps of 24 x 128 bytes of terse skills and English documentation, no instruction among them"

    def __init__(self, cache: Path, run: Run):
        from transformers import AutoTokenizer

        from stitched_llama.training import Collator, InstructionDataset, pad_token_id, read_rows, template

        own = self.place(cache, run.family, run.seed)
        places = {"": (DEMO, DEMO), "second": (own, own), "apart": (own, DEMO)}[run.family]
        self.anchors = [str(place / name) for place, name in zip(places, ("small", "large"))]
        self.rank = self.ranks[run.family]
        self.processor = tokenizer = AutoTokenizer.from_pretrained(self.anchors[0], trust_remote_code=False)
        self.collate = Collator(pad_token_id(tokenizer))
        rows = [read_rows(str(cache / "skills" / name)) for name in ("train.json", "heldout.json")]
        self.train, self.test = (
            InstructionDataset(part, tokenizer, template("short", tokenizer), 128) for part in rows
        )

    @staticmethod
    def place(cache: Path, family: str, seed: int) -> Path:
        """The folder of a family's anchors; of the skills for the demo's own."""
        return cache / (f"language-{family}" if family else "skills")

    @classmethod
    def prepare(cls, cache: Path, family: str, seed: int) -> None:
        """Makes skills, which every family meets, and anchors that are not there yet."""
        folder, make = cls.place(cache, family, seed), ("data/make_anchors.py", "--preset", "demo", "--threads", 1)
        skills = cls.place(cache, "", seed)
        with _SKILLS:
            if not skills.is_dir():
                _python("data/skills.py", output=skills)
        if folder.is_dir():
            return
        if family == "apart":
            _python(*make, "--large", "data/anchors/large", "--apart", "--seed", 1, output=folder)
        else:
            _python(*make, "--large-steps", 1000, "--small-steps", 500, "--seed", 2, output=folder)

    def model(self, anchors: list[str], space: dict) -> Any:
        import stitched_llama as sl

        return sl.StitchedLlamaForCausalLM.from_anchors(anchors, **{**self.space, **space}, dtype="float32")

    def calibration(self) -> Any:
        from stitched_llama.training import batches

        return batches(self.train, self.collate, 32, limit=512)

    def plain(self, anchor: str) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(anchor, dtype="float32", trust_remote_code=False)


_SKILLS = Lock()  # families are made side by side
TASKS: dict[str, type] = {"vision": Vision, "language": Language}


def _python(*arguments: Any, output: Path) -> None:
    """Runs a script of ours; its folder is there whole or not at all."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        made = Path(temporary) / output.name
        subprocess.run([sys.executable, *map(str, arguments), "--output", str(made)], check=True, cwd=ROOT, **quiet)
        made.rename(output)
