"""One fine-tune of the evidence: a seed, and what differs from this package's defaults.

    python benchmarks/studies.py RUN.json ROW.json

reads a `Run` as JSON and writes its row, whole or not at all: what a run that died measured is nowhere. `evidence.py` starts these.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import shutil
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peers import attach_peer
from tasks import Run, Vision

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def execute(run: Run, cache: Path, smoke: bool = False) -> dict[str, Any]:
    """Does a run and returns what it measured; seconds are those of its one thread, whatever else the machine does."""
    import torch
    from transformers import set_seed

    from stitched_llama import StitchTrainingArguments
    from stitched_llama.training import provenance

    torch.set_num_threads(1)
    set_seed(run.seed)
    task = Vision(cache, run)
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
    row = measure(run, task, arguments, cache, smoke)
    return provenance() | {"run": asdict(run), "settings": settings} | row


def _stitched(run: Run, task: Any, arguments: Any, cache: Path, smoke: bool) -> dict[str, Any]:
    import stitched_llama as sl
    from stitched_llama.training import spearman

    anchors = task.anchors
    if run.adapted:
        folder = adapted_folder(cache, run.adapted, run.seed, smoke)
        anchors = [str(folder / str(i)) for i in range(len(anchors))]
    model = task.model(anchors, run.space)
    row: dict[str, Any] = {}
    start = time.process_time()
    if run.init == "kaiming":
        for layer in model.stitching_layers.values():
            layer.init_kaiming()
    else:
        found = model.calibrate(task.calibration(), shared=run.init, ridge=run.ridge, progress=False)
        row |= {"r2": found.r2, "loss_fitted": found.loss}
    row["calibration_seconds"] = round(time.process_time() - start, 1)
    held_out = _batches(task)
    if run.kind == "untrained":
        return row | {"train_seconds": 0.0} | _quality(model, held_out)
    pst = run.pst if run.pst.get("full") else {"rank": task.rank, **run.pst}
    model.attach_pst(sl.PSTConfig(**pst))
    if run.peer:
        attach_peer(model, run.peer, _ranks(task))
    row["trained"] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trainer = sl.StitchImageTrainer(model=model, args=arguments, train_dataset=task.train, data_collator=task.collate)
    before, start = _memory(reset=True), time.process_time()
    trainer.train()
    row["train_seconds"] = round(time.process_time() - start, 1)
    row["memory_mb"] = None if before is None else round((_memory() - before) / 1024, 1)
    start = time.process_time()
    row |= _quality(model, held_out, run.hits)
    row["evaluation_seconds"] = round(time.process_time() - start, 1)
    row["stitches"] = [
        {"key": s.key, "params": s.params, "macs": s.macs, "anchor": s.is_anchor, "importance": trainer.importance.averages.get(s.key),
         "visits": trainer.importance.visits.get(s.key, 0), "gap": _crosses(model, s)} for s in model.space
    ]  # fmt: skip
    row["spearman"] = spearman([s.params for s in model.space], [row["accuracy"][s.key] for s in model.space])
    if run.angles:
        row["angles"] = _angles(model, task)
    return row


def _alone(run: Run, task: Any, arguments: Any, cache: Path, smoke: bool) -> dict[str, Any]:
    """Each anchor tuned by itself, nothing of `stitched_llama.models` in it."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer

    from stitched_llama.training import evaluate_plain

    row: dict[str, Any] = {"accuracy": {}, "loss": {}, "train_seconds": 0.0, "trained": 0}
    folder = adapted_folder(cache, run.name, run.seed, smoke)
    shutil.rmtree(folder, ignore_errors=True)
    arguments.label_names = ["labels"]
    for index, (anchor, rank) in enumerate(zip(task.anchors, _ranks(task))):
        model = task.plain(anchor)
        if not run.pst.get("full"):
            lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, modules_to_save=["classifier"])
            model = get_peft_model(model, lora)
        start = time.process_time()
        Trainer(model=model, args=arguments, train_dataset=task.train, data_collator=task.collate).train()
        row["train_seconds"] += time.process_time() - start
        row["trained"] += sum(p.numel() for p in model.parameters() if p.requires_grad)
        scores = evaluate_plain(model, _batches(task))
        row["loss"][str(index)], row["accuracy"][str(index)] = scores["loss"], scores["accuracy"]
        plain = model if run.pst.get("full") else model.merge_and_unload()
        plain.save_pretrained(folder / str(index))
        task.processor.save_pretrained(folder / str(index))
    return row


def _ranks(task: Any) -> tuple[int, ...]:
    return task.rank if isinstance(task.rank, tuple) else (task.rank,) * len(task.anchors)


def _batches(task: Any) -> list[dict[str, Any]]:
    from stitched_llama.training import batches

    return list(batches(task.test, task.collate, min(96, len(task.test) // 2)))


def _quality(model: Any, held_out: list[dict], hits: bool = False) -> dict[str, Any]:
    """Loss and accuracy of every stitch on all held-out rows, the accuracy on either half of them, and row by row with `hits`: a
    hexadecimal number a stitch and half, whose bits are the rows, the first the highest."""
    import torch

    from stitched_llama.training import image_scores

    rows = [sum(len(batch["labels"]) for batch in held_out[half::2]) for half in (0, 1)]
    found: dict[str, Any] = {"loss": {}, "accuracy": {}, "halves": [{}, {}], "half_rows": rows, "hits": [{}, {}]}
    model.eval()
    for key in model.keys:
        losses, right = [], []
        with torch.no_grad():
            for batch in held_out:
                logits = model(batch["pixel_values"], stitch_id=key).logits
                loss, count, hit = image_scores(logits, batch["labels"])
                losses.append((float(loss.double().sum()), float(count.double().sum())))
                right.append(hit.int().tolist())
        found["loss"][key] = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
        for half in (0, 1):
            own = [hit for part in right[half::2] for hit in part]
            found["halves"][half][key] = sum(own) / len(own)
            found["hits"][half][key] = f"{int(''.join(map(str, own)), 2):x}"
        found["accuracy"][key] = sum(map(sum, right)) / sum(map(len, right))
    if not hits:
        del found["hits"]
    return found


def _crosses(model: Any, stitch: Any) -> bool:
    """Whether a junction of the stitch joins maps of different resolution."""
    layers = [model.stitching_layers[junction.layer] for junction in stitch.junctions]
    return any(layer.in_grid != layer.out_grid for layer in layers)


def _memory(reset: bool = False) -> int | None:
    """The most this process held, in KiB, since it was reset: then what it holds now. None where the system does not tell."""
    import ctypes

    try:
        if reset:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what was used before is given back first
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except (OSError, AttributeError):
        return None
    return int(status.split("VmHWM:")[1].split()[0])


def _angles(model: Any, task: Any) -> dict[str, float]:
    """Angles in degrees between the gradients of stitches of the two smallest anchors, one batch of held-out rows, on the q, k
    and v matrices that both members of a pair use (ESTA figure 2)."""
    import torch

    order = torch.randperm(len(task.test), generator=torch.Generator().manual_seed(0))[:64].tolist()
    batch = task.collate([task.test[i] for i in order])
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


def adapted_folder(cache: Path, name: str, seed: int, smoke: bool) -> Path:
    """Where an `alone` run leaves its anchors."""
    return cache / ("adapted-smoke" if smoke else "adapted") / f"{name}-{seed}-{Vision.steps}"


def main() -> None:
    from stitched_llama.bundles import write_atomically
    from stitched_llama.training import dump_record

    wanted = json.loads(Path(sys.argv[1]).read_text())
    row = execute(Run(**wanted["run"]), Path(wanted["cache"]), wanted["smoke"])
    row["command"] = "studies.py"  # the run itself stands in the row
    write_atomically(sys.argv[2], lambda path: Path(path).write_text(dump_record(row)))


if __name__ == "__main__":
    main()
