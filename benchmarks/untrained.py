"""Sizes between two models that cost no training, on the rows a fine-tune is judged on.

    python benchmarks/untrained.py --anchors SMALL LARGE --data ROWS --eval_data ROWS --eval_size 96 --out rivals.json [--bf16]

SMALL was made from LARGE by `stitched-llama shrink` at equal width. Boomerang distillation (arXiv 2510.05064): blocks of the small model
are exchanged for the large model's from the last to the first (`small first`) or the other way round (`large first`, every second size). Block dropping:
the large model without the blocks whose output is most similar to their input (every second size; ShortGPT, as mergekit's passthrough would write it).
Prints a table and, last, one JSON line.
"""

import argparse
import copy
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stitched_llama import StitchedLlamaForCausalLM
from stitched_llama.models.loading import load_plain
from stitched_llama.space import anchor_specs, replaced_blocks
from stitched_llama.training import (
    Collator,
    InstructionDataset,
    batches,
    dump_record,
    evaluate_plain,
    evaluate_stitches,
    load_tokenizer,
    pad_token_id,
    provenance,
    read_parts,
    template,
)
from stitched_llama.training.route_search import exchanged_route


@torch.no_grad()
def similarity(model: Any, rows: list[dict[str, torch.Tensor]]) -> list[float]:
    """Mean cosine of each block's input and output over the tokens of `rows`."""
    totals, count = torch.zeros(model.config.num_hidden_layers), 0
    for batch in rows:
        states = model(
            batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states
        kept = batch["attention_mask"].bool()
        for block, (before, after) in enumerate(zip(states, states[1:])):
            totals[block] += nn.functional.cosine_similarity(before[kept].float(), after[kept].float(), dim=-1).sum()
        count += int(kept.sum())
    return (totals / count).tolist()


def without(model: Any, dropped: set[int]) -> Any:
    """A view of `model` without some of its blocks; weights are shared."""
    kept = [block for index, block in enumerate(model.model.layers) if index not in dropped]
    blocks, model.model.layers = model.model.layers, nn.ModuleList()
    view = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    model.model.layers = blocks
    view.model.layers = nn.ModuleList(kept)
    view.config.num_hidden_layers = len(kept)
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure sizes between that cost no training.")
    parser.add_argument("--anchors", nargs=2, required=True, help="folders or Hub ids, small and large")
    parser.add_argument("--data", required=True, help="rows to rank the blocks by, not those held out")
    parser.add_argument("--eval_data", required=True)
    parser.add_argument("--eval_size", type=int, default=96)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--template", default="auto")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--routes", nargs="*", help="keys that `--routes greedy` of the recipe found, without their training"
    )
    parser.add_argument("--seed", type=int, default=42, help="draws the rows, as in the recipe")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.train_split = options.eval_split = "train"
    options.on_bad_row = "skip"
    start, autocast = time.time(), torch.bfloat16 if options.bf16 else None
    tokenizer = load_tokenizer(options.anchors[0])
    prompt = template(options.template, tokenizer)
    collator = Collator(pad_token_id(tokenizer))
    train, held_out = (
        list(batches(InstructionDataset(part, tokenizer, prompt, options.max_length), collator, options.batch))
        for part in (lambda parts: (parts[0][:32], parts[1]))(read_parts(options, options.seed))
    )
    anchors = [load_plain(name, dtype=torch.float32) for name in options.anchors]
    configs = [anchor.config.to_dict() for anchor in anchors]
    groups = replaced_blocks(configs, anchor_specs(configs))
    patterns = {"boomerang, small first": [], "boomerang, large first": []}
    for count in range(1, len(groups)):
        patterns["boomerang, small first"].append([index >= count for index in range(len(groups))])
    for count in range(2, len(groups), 2):
        patterns["boomerang, large first"].append([index < count for index in range(len(groups))])
    routes = {name: [exchanged_route(groups, p) for p in found] for name, found in patterns.items()}
    routes |= {"greedy, untrained": options.routes} if options.routes else {}
    model = StitchedLlamaForCausalLM.from_anchors(
        anchors, routes=sorted({route for found in routes.values() for route in found}), adapter="identity"
    )
    scores = evaluate_stitches(model, held_out, split=True, autocast=autocast)

    def point(key: str, params: int, macs: int, values: dict[str, float]) -> dict[str, Any]:
        return {"key": key, "params": params, "macs": macs, **values}

    def stitch_point(key: str) -> dict[str, Any]:
        stitch = model.space[key]
        return point(key, stitch.params, stitch.macs, {name: values[key] for name, values in scores.items()})

    ends = [stitch_point(model.space.anchor_stitch(index).key) for index in (0, -1)]
    found = {name: [stitch_point(key) for key in keys] for name, keys in routes.items()}
    ranks, large = similarity(anchors[1], train), model.space.anchor_stitch(-1)
    order = sorted(range(len(ranks)), key=lambda block: -ranks[block])
    a_block = (large.params - model.space.anchor_stitch(0).params) // (len(ranks) - len(groups))
    found["block dropping"] = []
    for count in range(2, len(ranks) - len(groups) + 1, 2):
        values = evaluate_plain(without(anchors[1], set(order[:count])), held_out, split=True, autocast=autocast)
        macs = large.macs - count * (large.macs - model.space.anchor_stitch(0).macs) // (len(ranks) - len(groups))
        key = f"1 without {' '.join(map(str, sorted(order[:count])))}"
        found["block dropping"].append(point(key, large.params - count * a_block, macs, values))
    row = provenance() | {"anchors": ends, "methods": found, "seconds": round(time.time() - start, 1)}
    for name, points in found.items():
        told = " ".join(f"{p['loss_test']:.3f}" for p in sorted(points, key=lambda p: p["params"]))
        print(f"{name:<24} {told}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(dump_record(row))
    print(json.dumps({"held_out_rows": options.eval_size, "seconds": row["seconds"], "out": str(options.out)}))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    main()
