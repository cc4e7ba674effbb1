"""Differences of a shrunk model to the one it was cut from, damaged, edited or hostile, and what `load_delta` makes of them."""

import contextlib
import functools
import json
import random

import torch
from fuzzing import Different, edit_bytes, edit_json
from fuzzing_bundles import change_tensors, shrunk_pair
from safetensors import SafetensorError
from transformers import LlamaForCausalLM

from stitched_llama.bundles import WEIGHTS, sha256
from stitched_llama.shrinking import load_delta, save_delta
from stitched_llama.shrinking.delta import DELTA, RECORD

FULL = 300
EXTRA = (
    ("shrunk_from", 3), ("depth", 10**9), ("depth", 4), ("target_blocks", [0, 1, 4]), ("target_blocks", [0, 4]), ("target_blocks", [4]),
    ("target_blocks", list(range(10**5))), ("shared", 3), ("shared", []), ("name_or_path", "\x1b[2J"), ("delta_sha256", None),
    ("cut_sha256", "0"),
)  # fmt: skip


@functools.cache
def _expected(folder):
    return load_delta(LlamaForCausalLM.from_pretrained(folder / "large"), folder / "bundle").state_dict()


def prepare(folder):
    """`large`, and a difference to it in `bundle`."""
    small, large = shrunk_pair()
    large.save_pretrained(folder / "large")
    save_delta(small, large, folder / "bundle")


def cases(rng):
    """Endless cases; of half of them the digest of the differences is written anew."""
    while True:
        signed, seed = rng.random() < 0.5, rng.random()
        done = {}

        def mutate(case, signed=signed, seed=seed, done=done):
            own, bundle = random.Random(seed), case / "bundle"
            done["original"] = case.parents[1] / "deltas"
            how = own.random()
            if how < 0.35:
                edit_json(bundle / RECORD, own, EXTRA)
            elif how < 0.6:
                change_tensors(bundle / DELTA, own)
            elif how < 0.85:
                edit_bytes(bundle / own.choice([DELTA, DELTA, RECORD]), own)
            else:
                with contextlib.suppress(SafetensorError):
                    change_tensors(case / "large" / WEIGHTS, own)
            if signed:
                with contextlib.suppress(ValueError, OSError, TypeError, RecursionError):
                    record = json.loads((bundle / RECORD).read_text()) | {"delta_sha256": sha256(bundle / DELTA)}
                    (bundle / RECORD).write_text(json.dumps(record))

        def check(case, signed=signed, done=done):
            try:
                large, info = LlamaForCausalLM.from_pretrained(case / "large", output_loading_info=True)
            except (RuntimeError, SafetensorError) as error:  # Transformers' own
                raise ValueError(str(error)) from error
            if info["missing_keys"] or info["unexpected_keys"]:
                raise ValueError("Transformers warns of them")
            found = load_delta(large, case / "bundle").state_dict()
            for name, wanted in _expected(done["original"]).items():
                if found[name].shape != wanted.shape or not found[name].isfinite().all():
                    raise Different(f"{name} is {list(found[name].shape)}, or not finite")
                if not signed and not torch.equal(found[name], wanted):
                    raise Different(f"{name} differs")

        yield f"delta {'signed' if signed else 'unsigned'} {seed}", mutate, check
