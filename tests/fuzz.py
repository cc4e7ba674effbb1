"""Many damaged, edited and hostile inputs, each right or refused by name (`make fuzz`).

    python tests/fuzz.py --full --out benchmarks/results/reliability.json
    python tests/fuzz.py --bundles 100 --seed 5000

One option for each kind of cases that the modules `fuzzing_*` bring: how many. A fault is printed with its seed, which
`--only SEED` runs again alone. Ends with status 1 where there is one.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from fuzzing import FAULTS, kinds, run
from transformers.utils import logging


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = kinds()
    for name in found:
        parser.add_argument(f"--{name}", type=int, default=0, metavar="N", help=f"cases of {name}")
    parser.add_argument("--full", action="store_true", help="of every kind as many as its module says")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; each further one has the next")
    parser.add_argument("--only", type=int, help="run the one case of this seed")
    parser.add_argument("--out", type=Path, help="JSON of counts and faults, added to what is there")
    parser.add_argument("--verbose", action="store_true", help="a line a case")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    results = {}

    def report(seed, title, outcome, detail):
        if options.verbose or options.only is not None:
            print(seed, title, outcome, repr(detail[:300]))

    with tempfile.TemporaryDirectory() as root:
        for name, (prepare, cases, full) in found.items():
            if count := full if options.full else getattr(options, name):
                seeds = [options.only] if options.only is not None else range(options.seed, options.seed + count)
                results[name] = run(name, prepare, cases, seeds, Path(root), report)
                told = {key: value for key, value in results[name].items() if key != "faults"}
                print(f"{name}: {told}")
    if options.out is not None:
        before = json.loads(options.out.read_text()) if options.out.is_file() else {}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(before | results, indent=1) + "\n")
    return int(any(result.get(fault) for result in results.values() for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
