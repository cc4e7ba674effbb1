"""What least squares leaves between two LLaMAs, and what the alignment stage of `calibrate` lifts, on any plain text.

    python benchmarks/alignment.py --anchors SMALL LARGE --text FILE... [--steps 0 100 300] [--device cuda --dtype bfloat16]

Peer: least squares alone, the row of 0 steps. Every row starts afresh and is judged on the last 2 % of each file, which calibration never
sees: R2 of each junction, loss of each stitch in nats a token, and the valley, the mean loss of the stitches over the straight line
between the anchors. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from stitched_llama import StitchedLlamaForCausalLM
from stitched_llama.training import dump_record, provenance


def blocks(paths: list[Path], tokenizer: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token blocks [blocks, length] to calibrate on, shuffled, and those held out."""
    parts: tuple[list, list] = ([], [])
    for path in paths:
        ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False).input_ids)
        ids = ids[: len(ids) // length * length].view(-1, length)
        kept = len(ids) - max(1, len(ids) // 50)
        parts[0].append(ids[:kept])
        parts[1].append(ids[kept:])
    train, held_out = map(torch.cat, parts)
    shuffle = torch.Generator().manual_seed(0)
    return tuple(part[torch.randperm(len(part), generator=shuffle)] for part in (train, held_out))


def valley(losses: dict[str, float], space: Any) -> float:
    """Nats over the straight line between the anchors, a mean over the stitches."""
    small, large = space.anchor_stitch(0), space.anchor_stitch(-1)
    slope = (losses[large.key] - losses[small.key]) / (large.params - small.params)
    inner = [stitch for stitch in space if not stitch.is_anchor]
    return statistics.mean(losses[s.key] - losses[small.key] - slope * (s.params - small.params) for s in inner)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what an alignment stage lifts.")
    parser.add_argument("--anchors", nargs=2, required=True, help="folders or Hub ids, small and large")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="plain text files")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100, 300])
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--batches", type=int, default=256, help="batches to calibrate on")
    parser.add_argument("--held-out", type=int, default=8, help="batches to judge on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.anchors[0], trust_remote_code=False)
    train, held_out = blocks(options.text, tokenizer, options.length)
    batches = [{"input_ids": rows} for rows in train[: options.batches * options.batch].split(options.batch)]
    judged = [{"input_ids": rows} for rows in held_out[: options.held_out * options.batch].split(options.batch)]
    found = []
    for steps in sorted({0, *options.steps}):
        model = StitchedLlamaForCausalLM.from_anchors(options.anchors, dtype=options.dtype).to(options.device).eval()
        start = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # poor junctions are what this measures
            report = model.calibrate(batches, align_steps=steps, align_rate=options.rate, progress=False)
        seconds = time.monotonic() - start
        losses, tokens = dict.fromkeys(model.keys, 0.0), dict.fromkeys(model.keys, 0)
        with torch.no_grad():
            for batch in judged:
                batch = {"input_ids": batch["input_ids"].to(options.device)}
                for key in losses:
                    loss, count = model.calibration_loss(batch, key)
                    losses[key] += loss * count
                    tokens[key] += count
        losses = {key: value / tokens[key] for key, value in losses.items()}
        row = {"steps": steps, "seconds": round(seconds, 1), "r2": report.r2, "loss": losses}
        found.append(row | {"valley": valley(losses, model.space)})
    first, base = found[0], found[0]["seconds"]
    print(f"{'steps':>6} {'seconds':>8} {'valley':>7} {'lifted':>7}  loss of every stitch, small to large")
    for row in found:
        row["lifted"] = 1 - row["valley"] / first["valley"]
        losses = " ".join(f"{value:.3f}" for value in row["loss"].values())
        print(f"{row['steps']:>6} {row['seconds']:>8.1f} {row['valley']:>7.3f} {row['lifted']:>6.0%}  {losses}")
    print(f"R2 of least squares: {' '.join(f'{value:.2f}' for value in first['r2'].values())}")
    record = provenance() | {
        "command": f"alignment.py --steps {' '.join(map(str, options.steps))}",  # the files stand in the text beside it
        "peer": "least squares alone", "seconds_of_the_peer": base, "parameters": [s.params for s in model.space],
        "settings": {n: v for n, v in vars(options).items() if n not in ("anchors", "text")}, "rows": found,
    }  # fmt: skip
    print(json.dumps(json.loads(dump_record(record))))


if __name__ == "__main__":
    main()
