"""Runs that are killed at a random moment and go on with `--resume auto`: the end is that of a run that was never killed.

Each run is a process of its own, forked from one that has imported everything: a second a run.
"""

import logging
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
from tiny_runs import stitched_model, trained, trainer
from transformers.utils.logging import disable_progress_bar

from stitched_llama.training import find_checkpoint

FULL = 40
SHORT = False  # not for the short fuzz test: test_resume.py runs two cases
STEPS, SECONDS = 6, 100
_PROCESSES = get_context("forkserver")
_PROCESSES.set_forkserver_preload(["fuzzing_kills"])


def _train(home, output, options):
    """One run from the newest whole checkpoint in `output`, to its end; leaves the weights there."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.stdout = open(os.devnull, "w")  # what is logged there is of no use here
    logging.disable(logging.WARNING)
    disable_progress_bar()
    torch.set_num_threads(1)
    made = trainer(stitched_model([home / "small", home / "large"]), output, max_steps=STEPS, **options)
    made.train(resume_from_checkpoint=find_checkpoint("auto", str(output)))
    torch.save(trained(made.model), output / "weights.new")
    os.replace(output / "weights.new", output / "weights.pt")


def _run(home, output, options, seconds=None, number=None):
    """A process of `_train`, sent the signal `number` after some seconds; its exit code."""
    process = _PROCESSES.Process(target=_train, args=(home, output, options))
    with mock.patch.dict(
        os.environ, PYTHONPATH=os.pathsep.join(sys.path)
    ):  # of the server that the processes are forked from
        process.start()
    process.join(SECONDS if seconds is None else seconds)
    if process.is_alive() and number is not None:
        os.kill(process.pid, number)
        process.join(SECONDS)
    assert not process.is_alive(), process.kill()
    return process.exitcode


def prepare(folder):
    """Anchors, and `bundle/`, where cases write."""
    from conftest import spread

    from stitched_llama.training import byte_tokenizer, pico_anchor

    for number, (name, shape) in enumerate((("small", (32, 2, 4, 2)), ("large", (48, 3, 6, 3)))):
        tokenizer = byte_tokenizer()
        spread(pico_anchor(*shape, vocab_size=len(tokenizer)), seed=number).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "bundle").mkdir()
    (folder / "bundle" / "README").write_text("runs of cases lie here\n")


_whole = {}  # options -> weights and seconds of the run that is not killed


def _unkilled(home, output, options):
    if (key := tuple(sorted(options.items()))) not in _whole:
        start = time.monotonic()
        assert _run(home, output, options) == 0
        seconds = time.monotonic() - start
        _whole[key] = torch.load(output / "weights.pt"), seconds
        shutil.rmtree(output)
    return _whole[key]


def cases(rng):
    """`(name, mutate, check)`: `check(folder)` raises an AssertionError where the weights at the end are others."""
    while True:
        options = {
            "save_strategy": "steps",
            "save_steps": rng.choice([1, 2]),
            "save_total_limit": rng.choice([None, 1, 2]),
        }
        kills = [(rng.choice([signal.SIGKILL, signal.SIGTERM]), rng.random()) for _ in range(rng.choice([1, 1, 2, 3]))]
        told = ", ".join(f"{number.name} at {share:.2f}" for number, share in kills)

        def check(folder, options=options, kills=kills):
            output = folder / "bundle" / "run"
            wanted, seconds = _unkilled(folder, output, options)
            for number, share in kills:
                code = _run(folder, output, options, seconds * share, number)
                allowed = {0, -number} | ({128 + number} if number == signal.SIGTERM else set())
                assert code in allowed, f"a killed run ends with {code}, not one of {sorted(allowed)}"
            assert _run(folder, output, options) == 0, "the run that goes on fails"
            found = torch.load(output / "weights.pt")
            differ = [name for name in wanted if not torch.equal(wanted[name], found[name])]
            assert not differ, f"{len(differ)} of {len(wanted)} tensors differ, the first is {differ[0]}"

        yield f"{told}; {options}", lambda folder: None, check


def kill_and_compare(folder, seed):
    """One case, for the default test run."""
    prepare(Path(folder))
    name, _, check = next(cases(random.Random(seed)))
    try:
        check(Path(folder))
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error
