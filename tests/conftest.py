"""Pico anchors built once a session, offline; warnings are errors, with the exceptions listed here."""

import os

if "TESTS_MAY_REACH_HUB" not in os.environ:  # set for the process that talks to the loopback hub
    os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["BITSANDBYTES_NOWELCOME"] = "1"

import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # pico models: more threads cost more than they give

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# (width, blocks, heads, key/value heads, further config fields), and the options of the space
FAMILIES = {
    "unequal": ([(32, 3, 4, 2, {}), (48, 5, 6, 3, {"head_dim": 12})], {}),
    "equal": ([(32, 4, 4, 2, {}), (48, 4, 6, 3, {"head_dim": 12})], {"kernel_size": 2}),
    "three": ([(32, 3, 4, 2, {}), (40, 4, 5, 1, {}), (48, 5, 6, 3, {"head_dim": 12})], {"pairs": "chain"}),
}

MARKERS = ("gpu", "slow", "hub")  # left out unless selected with -m; setup.cfg says what they mean

# Each exception has its reason; anything else that warns fails the test.
ALLOWED_WARNINGS = {
    "ignore:.*pin_memory.*": "Trainer asks for pinned memory on a machine without an accelerator",
    "ignore:.*torch.jit.script.*:DeprecationWarning": "torch's own modules at import",
    "ignore::DeprecationWarning:torch": "torch's own",
    "ignore::DeprecationWarning:bitsandbytes": "bitsandbytes' own",
    "ignore::FutureWarning:bitsandbytes": "bitsandbytes' own",
    "ignore::FutureWarning:torch": "torch's own",
    "ignore:MatMul8bitLt.*": "8-bit inputs are cast, which is what 8-bit means",
    "ignore::ResourceWarning": "files that a library leaves to the garbage collector",
    "ignore::pytest.PytestUnraisableExceptionWarning": "the same, seen by pytest",
    "ignore:.*use of fork.*:DeprecationWarning": "subprocesses started while a streamer thread lives",
}


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    for line in ALLOWED_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr:
        return
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in MARKERS)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@torch.no_grad()
def spread(model, seed=0, std=0.2):
    """Weights so large that the logits of any two stitches differ plainly."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        parameter.copy_(noise if parameter.ndim > 1 else 1 + noise)
    return model


@torch.no_grad()
def randomise(model, seed=0, std=0.1):
    """Random values in every trainable tensor: PST is born zero, where many faults hide."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def fresh(folders, pst=None, seed=0, **options):
    """A stitched model whose stitching layers, and PST settings `pst` where given, hold random values."""
    from stitched_llama import StitchedLlamaForCausalLM

    torch.manual_seed(seed)
    model = StitchedLlamaForCausalLM.from_anchors(folders, **options)
    if pst is not None:
        model.attach_pst(pst)
        randomise(model, seed)
    return model


def ids_like(rows, tokens, seed=0, vocab_size=260):
    """Random token ids [rows, tokens], none of them special."""
    return torch.randint(4, vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def python(*arguments, check=True, cwd=ROOT, **environment):
    """Runs Python in a process of its own, by default from the root of the repository."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="session")
def tokenizer():
    from stitched_llama.training import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(scope="session")
def anchors(tmp_path_factory, tokenizer):
    """Family name -> folders of its anchors, small to large, each with the tokenizer."""
    from stitched_llama.training import pico_anchor

    folder, families = tmp_path_factory.mktemp("anchors"), {}
    for family, (shapes, _) in FAMILIES.items():
        families[family] = []
        for number, (*shape, fields) in enumerate(shapes):
            path = folder / f"{family}{number}"
            spread(pico_anchor(*shape, vocab_size=len(tokenizer), **fields), seed=number).save_pretrained(path)
            tokenizer.save_pretrained(path)
            families[family].append(str(path))
    return families


@pytest.fixture(scope="session")
def stitched(anchors):
    """`stitched(family, pst=False)`: a model that no test may change, built once."""
    from stitched_llama import PSTConfig

    built = {}

    def get(family, pst=False):
        if (family, pst) not in built:
            settings = PSTConfig(rank=4, stitching_rank=3) if pst else None
            built[family, pst] = fresh(anchors[family], settings, **FAMILIES[family][1])
        return built[family, pst]

    return get


def with_table(model):
    """The model, its table publishing ids 0, 2 and the largest alone."""
    last = len(model.space) - 1
    loss = {s.key: {0: 3.0, 2: 2.0, last: 1.0}.get(s.stitch_id, 5.0) for s in model.space}
    model.table = model.table.with_metrics("loss", loss, decides=True)
    return model


@pytest.fixture
def made(anchors):
    """A fresh model with random PST and a table; it may be changed."""
    from stitched_llama import PSTConfig

    return with_table(fresh(anchors["unequal"], PSTConfig(rank=4, stitching_rank=3)))


@pytest.fixture
def bundle(made, tmp_path):
    made.save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"
