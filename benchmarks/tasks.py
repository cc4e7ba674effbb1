"""What the evidence is measured on: the description of a run, and its anchors and data."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Run:
    """What one run does.

    Attributes:
        name: of the setting, equal over seeds.
        space, pst, training: options of `StitchSpace`, `PSTConfig` and `StitchTrainingArguments` unlike `Vision`'s.
        kind: `"stitched"`; `"untrained"`, the same without any training; or `"alone"`: each anchor by plain PEFT LoRA, or whole
            where `pst` says `full`.
        family: anchors other than the ViTs.
        init: start of the stitching layers: `"joint"`, `"mean"` (both least squares) or `"kaiming"`.
        ridge: of the least squares, relative to the mean variance of the features.
        adapted: name of an `alone` run of this seed whose tuned anchors are stitched: adapt-then-stitch.
        peer: what trains instead of LoRA or the biases (`peers.py`).
        part: of the data: `"source"`, what the anchors were pretrained on; all for `""`.
        shots: pictures a class; 0 for ten.
        angles: also the pairwise gradient angles between stitches at the end.
        hits: also which held-out rows each stitch got right.
        lasts: names of runs of this seed; this one takes as many steps as fit into their seconds.
        rate_of: the run whose seconds a step tell how many those are.
    """

    name: str
    seed: int
    space: dict = field(default_factory=dict)
    pst: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    kind: str = "stitched"
    family: str = ""
    init: str = "joint"
    ridge: float = 1e-4
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


def _python(*arguments: Any, output: Path) -> None:
    """Runs a script of ours; its folder is there whole or not at all."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        made = Path(temporary) / output.name
        subprocess.run([sys.executable, *map(str, arguments), "--output", str(made)], check=True, cwd=ROOT, **quiet)
        made.rename(output)
