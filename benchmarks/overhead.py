"""What stitching costs at run time: anchor-only stitches against the plain Transformers model of the same weights.

    python benchmarks/overhead.py [--width 256 384 --depth 8 12 --tokens 64 --repeats 7]

Peer: `transformers.LlamaForCausalLM`. Ratios of medians in one run, stitched / plain: 1.00 is no overhead. The middle stitch
stands beside the straight line between its anchors' times, by blocks taken from each.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from transformers import LlamaForCausalLM

from stitched_llama import PSTConfig, StitchedLlamaForCausalLM
from stitched_llama.training import pico_anchor, provenance


def seconds(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median time of each call, the first left out; they take turns, so that what else a machine does meets all alike."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, own in zip(runs, times):
            start = time.perf_counter()
            run()
            own.append(time.perf_counter() - start)
    return [statistics.median(own[1:]) for own in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, nargs=2, default=[256, 384])
    parser.add_argument("--depth", type=int, nargs=2, default=[8, 12])
    parser.add_argument("--tokens", type=int, default=64, help="prompt length, and tokens decoded")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    anchors: list[LlamaForCausalLM] = [
        pico_anchor(width, depth, heads=width // 32, kv_heads=width // 32, vocab_size=4096)
        for width, depth in zip(args.width, args.depth)
    ]
    stitched = StitchedLlamaForCausalLM.from_anchors(copy.deepcopy(anchors))  # PST goes into what it is given
    space, prompt = stitched.space, torch.randint(3, 4096, (1, args.tokens))
    middle = space[len(space) // 2]
    fixed = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}
    work = {
        "prefill": (lambda model, **how: model(prompt, use_cache=False, **how)),
        "generate": (lambda model, **how: model.generate(prompt, **fixed, **how)),
    }
    rows = []
    with torch.no_grad():
        for pst in (False, True):
            if pst:
                stitched.attach_pst(PSTConfig())
            for name, run in work.items():
                for stitch in (space.anchor_stitch(0), middle, space.anchor_stitch(1)):
                    calls = [lambda run=run, s=stitch: run(stitched, stitch_id=s.key)]
                    calls += [lambda run=run, a=anchor: run(a) for anchor in anchors]
                    took, *plain = seconds(calls, args.repeats)
                    shares = [0.0, 0.0]
                    for segment in stitch.segments:
                        shares[segment.anchor] += len(segment) / args.depth[segment.anchor]
                    peer = sum(share * plain_time for share, plain_time in zip(shares, plain))
                    rows.append({"work": name, "pst": pst, "stitch": stitch.key, "seconds": took, "ratio": took / peer})
    print(f"{'work':<10} {'PST':<5} {'stitch':<20} {'ms':>9} {'ratio to plain':>15}")
    for row in rows:
        print(
            f"{row['work']:<10} {row['pst']!s:<5} {row['stitch']:<20} {1e3 * row['seconds']:9.2f} {row['ratio']:15.2f}"
        )
    print(json.dumps(provenance() | {"peer": "transformers.LlamaForCausalLM", "arguments": vars(args), "rows": rows}))


if __name__ == "__main__":
    main()
