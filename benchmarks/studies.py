"""One fine-tune of the evidence: a task, a seed, and what differs from this package's defaults.

    python benchmarks/studies.py RUN.json ROW.json

reads a `Run` as JSON and writes its row, whole or not at all: what a run that died measured is nowhere. `evidence.py` starts these.
"""

from __future__ import annotations

import itertools
import json
import math
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Run:
    """What one run does.

    Attributes:
        name: of the setting, equal over seeds.
        space, pst, training: options of `StitchSpace`, `PSTConfig` and `StitchTrainingArguments` unlike the task's own.
        kind: `"stitched"`, or `"alone"`: each anchor by plain PEFT LoRA, or whole where `pst` says `full`.
        init: start of the stitching layers: `"joint"`, `"mean"` (both least squares) or `"kaiming"`.
        adapted: name of an `alone` run of this seed whose tuned anchors are stitched: adapt-then-stitch.
        source: fine-tune on what the anchors were pretrained on (vision).
        shots: pictures a class (vision); 0 is the task's own.
        angles: also the pairwise gradient angles between stitches at the end.
        before: also the quality of every stitch before training.
    """

    task: str
    name: str
    seed: int
    space: dict = field(default_factory=dict)
    pst: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    kind: str = "stitched"
    init: str = "joint"
    adapted: str | None = None
    source: bool = False
    shots: int = 0
    angles: bool = False
    before: bool = False


class Vision:
    """Three ViTs of scikit-learn's digits 0 to 6 (`data/make_vits.py`, a family of its own for each seed), adapted to all ten."""

    metric, trainer = "accuracy", "StitchImageTrainer"
    rank: Any = (16, 8, 4)
    space = {"kernel_size": 2}
    steps = 600
    training = {
        "per_device_train_batch_size": 32, "global_batch_size": 32, "learning_rate": 2e-3, "weight_decay": 1e-4,
        "warmup_steps": 0.1, "interval_count": 15,
    }  # fmt: skip
    full_rate = 5e-4

    def __init__(self, cache: Path, run: Run):
        from transformers import AutoImageProcessor

        from stitched_llama.training import ImageSet, collate_images, few_shot, read_images
        from stitched_llama.training.images import Images

        self.folder, self.collate = cache / f"vision-{run.seed}", collate_images
        self.anchors = [str(self.folder / "anchors" / name) for name in ("tiny", "small", "base")]
        self.processor = processor = AutoImageProcessor.from_pretrained(self.anchors[-1], use_fast=False)
        parts = [read_images(str(self.folder / "digits.npz"), part) for part in ("train", "test")]
        if run.source:
            kept = [[i for i, label in enumerate(part.labels) if label < 7] for part in parts]
            parts = [
                Images([p.pictures[i] for i in own], [p.labels[i] for i in own], p.names[:7])
                for p, own in zip(parts, kept)
            ]
        train, test = parts
        train = few_shot(train, run.shots or 10, run.seed) if not run.source else train
        self.names, self.train, self.test = train.names, ImageSet(train, processor), ImageSet(test, processor)

    @staticmethod
    def prepare(cache: Path, seed: int) -> None:
        if not (cache / f"vision-{seed}" / "anchors.json").is_file():
            _python("data/make_vits.py", "--output", cache / f"vision-{seed}", "--seed", 10 * seed)

    def model(self, anchors: list[str], space: dict) -> Any:
        import stitched_llama as sl

        return sl.StitchedViTForImageClassification.from_anchors(
            anchors, **{**self.space, **space}, num_labels=len(self.names)
        )

    def calibration(self) -> Iterator[dict]:
        import torch

        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))[:100].tolist()
        for first in range(0, len(order), 10):
            yield {"pixel_values": self.train.pixels[order[first : first + 10]]}

    def plain(self, anchor: str) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification.from_pretrained(
            anchor, ignore_mismatched_sizes=True, id2label=dict(enumerate(self.names))
        )

    head = ["classifier"]


class Language:
    """The demo's two byte-level LLaMAs (`data/anchors`), fine-tuned on 24 instruction skills (`data/skills.py`)."""

    metric, trainer = "exact_match", "StitchTrainer"
    rank: Any = 16
    space: dict = {}
    steps = 600
    training = {
        "per_device_train_batch_size": 16, "global_batch_size": 16, "learning_rate": 3e-3, "weight_decay": 1e-4,
        "warmup_steps": 0.06, "interval_count": 6,
    }  # fmt: skip
    full_rate = 1e-3

    def __init__(self, cache: Path, run: Run):
        from transformers import AutoTokenizer

        from stitched_llama.training import Collator, InstructionDataset, pad_token_id, read_rows, template

        self.anchors = [str(ROOT / "data" / "anchors" / name) for name in ("small", "large")]
        self.processor = tokenizer = AutoTokenizer.from_pretrained(self.anchors[0])
        self.collate = Collator(pad_token_id(tokenizer))
        self.train, self.test = (
            InstructionDataset(read_rows(str(cache / "skills" / name)), tokenizer, template("short"), 128)
            for name in ("train.json", "heldout.json")
        )

    @staticmethod
    def prepare(cache: Path, seed: int) -> None:
        if not (cache / "skills" / "heldout.json").is_file():
            _python("data/skills.py", "--output", cache / "skills")

    def model(self, anchors: list[str], space: dict) -> Any:
        import stitched_llama as sl

        return sl.StitchedLlamaForCausalLM.from_anchors(anchors, **{**self.space, **space}, dtype="float32")

    def calibration(self) -> Any:
        from stitched_llama.training import batches

        return batches(self.train, self.collate, 32, limit=512)

    def plain(self, anchor: str) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(anchor, dtype="float32")

    head: list[str] = []


TASKS: dict[str, type] = {"vision": Vision, "language": Language}


def execute(run: Run, cache: Path, smoke: bool = False) -> dict[str, Any]:
    """Does a run and returns what it measured."""
    import torch
    from transformers import set_seed

    from stitched_llama import StitchTrainingArguments
    from stitched_llama.training import provenance

    torch.set_num_threads(1)
    set_seed(run.seed)
    task = TASKS[run.task](cache, run)
    full = run.pst.get("full", False)
    rate = {"learning_rate": task.full_rate} if full else {}
    settings = {"max_steps": task.steps, **task.training, **rate, **run.training}
    if smoke:
        settings |= {"max_steps": 6}
        task.test = torch.utils.data.Subset(task.test, range(48))
    arguments = StitchTrainingArguments(
        output_dir=str(cache / "trainer"), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_steps=10**6, dataloader_pin_memory=False, seed=run.seed, **settings,
    )  # fmt: skip
    measure = _alone if run.kind == "alone" else _stitched
    row = measure(run, task, arguments, cache)
    return provenance() | {"run": asdict(run), "settings": settings, "metric": task.metric} | row


def _stitched(run: Run, task: Any, arguments: Any, cache: Path) -> dict[str, Any]:
    import stitched_llama as sl
    from stitched_llama.training import spearman

    anchors = task.anchors
    if run.adapted:
        anchors = [str(_adapted(cache, run.task, run.adapted, run.seed) / str(i)) for i in range(len(anchors))]
    model = task.model(anchors, run.space)
    r2 = {}
    if run.init == "kaiming":
        for layer in model.stitching_layers.values():
            layer.init_kaiming()
    else:
        r2 = model.calibrate(task.calibration(), shared=run.init, progress=False).r2
    pst = run.pst if run.pst.get("full") else {"rank": task.rank, **run.pst}
    model.attach_pst(sl.PSTConfig(**pst))
    row: dict[str, Any] = {"r2": r2, "trained": sum(model.trainable_parameters().values())}
    held_out = _batches(task)
    if run.before:
        row["before"] = _quality(model, held_out, task.metric)[task.metric]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer = getattr(sl, task.trainer)(
        model=model, args=arguments, train_dataset=task.train, data_collator=task.collate
    )
    start = time.monotonic()
    trainer.train()
    row["train_seconds"] = round(time.monotonic() - start, 1)
    row["memory_mb"] = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1)
    start = time.monotonic()
    row |= _quality(model, held_out, task.metric)
    row["evaluation_seconds"] = round(time.monotonic() - start, 1)
    row["stitches"] = [
        {"key": s.key, "params": s.params, "macs": s.macs, "anchor": s.is_anchor, "importance": trainer.importance.averages.get(s.key),
         "visits": trainer.importance.visits.get(s.key, 0)} for s in model.space
    ]  # fmt: skip
    trainer.save_importance()
    row["spearman"] = spearman([s.params for s in model.space], [row[task.metric][s.key] for s in model.space])
    if run.angles:
        row["angles"] = _angles(model, task)
    return row


def _alone(run: Run, task: Any, arguments: Any, cache: Path) -> dict[str, Any]:
    """Each anchor tuned by itself, nothing of `stitched_llama.models` in it."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer

    from stitched_llama.training import evaluate_plain

    ranks = task.rank if isinstance(task.rank, tuple) else (task.rank,) * len(task.anchors)
    row: dict[str, Any] = {task.metric: {}, "loss": {}, "train_seconds": 0.0, "trained": 0}
    folder = _adapted(cache, run.task, run.name, run.seed)
    shutil.rmtree(folder, ignore_errors=True)
    arguments.label_names = ["labels"]
    for index, (anchor, rank) in enumerate(zip(task.anchors, ranks)):
        model = task.plain(anchor)
        if not run.pst.get("full"):
            lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, modules_to_save=task.head or None)
            model = get_peft_model(model, lora)
        start = time.monotonic()
        Trainer(model=model, args=arguments, train_dataset=task.train, data_collator=task.collate).train()
        row["train_seconds"] += time.monotonic() - start
        row["trained"] += sum(p.numel() for p in model.parameters() if p.requires_grad)
        row["loss"][str(index)], row[task.metric][str(index)] = evaluate_plain(model, _batches(task))
        plain = model if run.pst.get("full") else model.merge_and_unload()
        plain.save_pretrained(folder / str(index))
        task.processor.save_pretrained(folder / str(index))
    return row


def _batches(task: Any) -> list[dict[str, Any]]:
    from stitched_llama.training import batches

    return list(batches(task.test, task.collate, min(96, len(task.test) // 2)))


def _quality(model: Any, held_out: list[dict], metric: str) -> dict[str, Any]:
    """Loss and metric of every stitch on all held-out rows, and the metric on either half of them."""
    from stitched_llama.training import evaluate_stitches

    halves = [evaluate_stitches(model, held_out[half::2], progress=False) for half in (0, 1)]
    rows = [sum(len(batch["labels"]) for batch in held_out[half::2]) for half in (0, 1)]
    both = {
        name: {
            key: sum(found[name][key] * count for found, count in zip(halves, rows)) / sum(rows)
            for key in halves[0][name]
        }
        for name in ("loss", metric)
    }
    return both | {"halves": [found[metric] for found in halves], "half_rows": rows}


def _angles(model: Any, task: Any) -> dict[str, float]:
    """Angles in degrees between the gradients of stitches of the two smallest anchors, one batch, on the q, k and v
    matrices that both members of a pair use (ESTA figure 2)."""
    import torch

    batch = task.collate([task.train[i] for i in range(min(64, len(task.train)))])
    own = [s for s in model.space if {g.anchor for g in s.segments} <= {0, 1} and not s.is_anchor][:32]
    weights = {
        name: p for name, p in model.named_parameters()
        if name.startswith("anchors.") and p.ndim == 2 and any(part in name for part in ("q_proj", "k_proj", "v_proj"))
    }  # fmt: skip
    for parameter in weights.values():
        parameter.requires_grad_(True)
    model.eval()
    gradients = []
    for stitch in own:
        loss = model(**batch, stitch_id=stitch.key).loss
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        gradients.append({name: g for name, g in zip(weights, found) if g is not None})
    angles = []
    for one, other in itertools.combinations(gradients, 2):
        shared = one.keys() & other.keys()
        if not shared:
            continue
        a, b = (torch.cat([g[name].flatten() for name in sorted(shared)]) for g in (one, other))
        angles.append(math.degrees(math.acos(float((a @ b / (a.norm() * b.norm() + 1e-20)).clamp(-1, 1)))))
    return {
        "mean": statistics.mean(angles),
        "above_90": sum(a > 90 for a in angles) / len(angles),
        "pairs": len(angles),
    }


def _adapted(cache: Path, task: str, name: str, seed: int) -> Path:
    return cache / "adapted" / f"{task}-{name}-{seed}"


def _python(*arguments: Any) -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, *map(str, arguments)], check=True, cwd=ROOT, **quiet)


def main() -> None:
    from stitched_llama.bundles import write_atomically
    from stitched_llama.training import dump_record

    wanted = json.loads(Path(sys.argv[1]).read_text())
    row = execute(Run(**wanted["run"]), Path(wanted["cache"]), wanted["smoke"])
    row["command"] = "studies.py"  # the run itself stands in the row
    write_atomically(sys.argv[2], lambda path: Path(path).write_text(dump_record(row)))


if __name__ == "__main__":
    main()
