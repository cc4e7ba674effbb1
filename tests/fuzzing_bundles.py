"""Bundles whose files are damaged, edited or hostile, and what loading, `bundle verify`, `bundle show` and `space` make of them."""

import contextlib
import functools
import io
import shutil
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from fuzzing import Different, Fault, edit_bytes, edit_json
from image_anchors import build
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from stitched_llama import PSTConfig, StitchedLlamaForCausalLM, StitchedViTForImageClassification
from stitched_llama.bundles import CONFIG, DIGESTS, GENERATION, TABLE, WEIGHTS, recorded_files, write_digests
from stitched_llama.cli import main
from stitched_llama.shrinking import cut_model

# `routes`: an anchor and one cut out of it, routes given one by one, a LoRA of the stitches, anchors tuned alone
CLASSES = {
    "llama": StitchedLlamaForCausalLM,
    "vit": StitchedViTForImageClassification,
    "routes": StitchedLlamaForCausalLM,
}
AUTO = {"llama": AutoModelForCausalLM, "vit": AutoModelForImageClassification, "routes": AutoModelForCausalLM}
INPUTS = {"llama": torch.arange(4, 15)[None], "vit": torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)}
INPUTS["routes"] = INPUTS["llama"]
FULL = 2000
SPACES = ("swin", "convnext", "resnet", "dinov2", "mobilenet", "deit", "llama", "routes")
CODE = "import os, pathlib\npathlib.Path(os.environ['FUZZ_FOLDER'], 'CODE_WAS_RUN').touch()\nclass Evil: pass\n"
EXTRA = (
    ("auto_map", {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}),
    ("model_type", "evil"), ("attn_implementation", "someone/kernels"), ("_attn_implementation", "flash_attention_2"),
    ("num_labels", 10**8), ("num_hidden_layers", 20_000), ("num_hidden_layers", 10**8), ("interval_count", 10**9),
    ("keys", ["x"] * 10**6), ("depths", [10**8]), ("hidden_size", 10**12), ("vocab_size", 10**12),
    ("max_position_embeddings", 10**15), ("quantization_config", {"load_in_8bit": True}), ("to_dict", 1), ("validate", 1),
    ("image_size", 10**9), ("id2label", {"0": "\x1b]0;x\x07"}), ("kernel_size", 10**9), ("pst", None), ("stride", 0),
    ("default_stitch_id", "\x1b[2J"), ("name_or_path", "\x1b[2J"), ("rope_theta", 3.0), ("rms_norm_eps", 0.5),
    ("hidden_act", "relu"), ("hidden_act", "\x1b[2J"), ("layer_types", ["x"]), ("dtype", "load"), ("pairs", "chain"),
    ("shrunk_from", 3), ("shrunk_from", {"depth": 5, "target_blocks": [0, 2, 4], "shared": 3}), ("shared", 3), ("depth", 10**9),
    ("shrunk_from", {"depth": 10**9, "target_blocks": list(range(10**5))}), ("target_blocks", [0, 1, 4]), ("target_blocks", [0.0]),
    ("junctions", [[a % 5, a % 7] for a in range(10**5)]), ("junctions", [["x" * 10**5]]), ("junctions", "aligned"),
    ("routes", ["0[0:2]>1[3:5]"] * 2), ("routes", ["00[0:2]>1[3:5]", "0[0:2]>1[3:5]"]), ("routes", ["x" * 10**6]), ("routes", [3]),
    ("routes", [f"0[0:{a}]>1[{a}:5]" for a in range(20_000)]), ("stitch_rank", 10**9), ("stitch_rank", "x"), ("stitch_rank", 0),
    ("stitch_bias", "x"), ("dropout", float("nan")), ("full", 1), ("alone", 3), ("alone", {"\x1b[2J": {"loss": 1}}),
    ("alone", {"0[0:3]": {"loss": 1e308, "loss_test": -1e308}}), ("palette_gain", "\x1b[2J"), ("adapter", "identity"),
)  # fmt: skip


@functools.cache
def _expected(folder, kind):
    """Logits of every stitch of the bundle that all cases begin with."""
    return _logits(CLASSES[kind].from_pretrained(folder / "bundle"), kind)


@torch.no_grad()
def _logits(model, kind):
    return {key: model(INPUTS[kind], stitch_id=key).logits for key in model.keys}


def prepare(folder):
    """`KIND/bundle` and `KIND/anchors` of language and of images, and configurations of every family in `spaces`."""
    from conftest import randomise, spread

    from stitched_llama.training import byte_tokenizer, pico_anchor

    for kind in CLASSES:
        home, shapes = folder / kind, ((32, 3, 4, 2), (48, 5, 6, 3))
        if kind == "llama":
            models = [spread(pico_anchor(*s, vocab_size=260), i) for i, s in enumerate(shapes)]
        else:
            models = build("vit") if kind == "vit" else shrunk_pair()
        for number, anchor in enumerate(models):
            anchor.save_pretrained(home / "anchors" / str(number))
            if kind != "vit":
                byte_tokenizer().save_pretrained(home / "anchors" / str(number))
        torch.manual_seed(0)
        paths = [str(home / "anchors" / str(number)) for number in range(2)]
        given = {"routes": ROUTES, "adapter": "identity"} if kind == "routes" else {}
        stitched = CLASSES[kind].from_anchors(paths, **given)
        stitched.attach_pst(PSTConfig(rank=2, stitching_rank=2, stitch_rank=2 if kind == "routes" else 0))
        randomise(stitched)
        loss = {stitch.key: float(10 - stitch.stitch_id) for stitch in stitched.space}
        stitched.table = stitched.table.with_metrics("loss", loss, decides=True)
        if kind == "routes":
            ends = [stitched.space.anchor_stitch(index).key for index in (0, -1)]
            alone = {key: {"loss": loss[key] - 0.5, "loss_test": loss[key] - 0.4} for key in ends}
            stitched.table = replace(stitched.table.with_metrics("loss_test", loss), alone=alone)
        for number, reference in enumerate(stitched.config.anchors):
            reference["name_or_path"] = f"../anchors/{number}"
        stitched.save_pretrained(home / "bundle")
        _expected(home, kind)
    for family in SPACES:
        if family not in ("llama", "routes"):
            for number, anchor in enumerate(build(family)):
                anchor.config.save_pretrained(folder / "spaces" / family / str(number))
    for kind in ("llama", "routes"):
        shutil.copytree(folder / kind / "anchors", folder / "spaces" / kind, ignore=lambda *_: ["model.safetensors"])


ROUTES = ["0[0:2]>1[3:5]", "1[0:1]>0[1:2]>1[3:5]"]


def shrunk_pair():
    """An anchor of 3 blocks cut out of one of 5, and that one."""
    from conftest import spread

    from stitched_llama.training import pico_anchor

    large = spread(pico_anchor(48, 5, 6, 3, vocab_size=260, tie_word_embeddings=True), 1)
    cut = cut_model(large, 3)
    shared = ["embedding", "head"]
    cut.model.config.shrunk_from = {
        "name_or_path": "large",
        "revision": None,
        "depth": 5,
        "target_blocks": cut.target_blocks,
        "shared": shared,
    }
    spread(cut.model.model.layers, 2)
    return [cut.model, large]


# ---- what is done to a bundle


def change_tensors(path, rng):
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
    name = rng.choice(sorted(found))
    tensor, how = (
        found[name],
        rng.choice(["swap", "dtype", "nan", "inf", "zeros", "scale", "drop", "extra", "rename", "shape"]),
    )
    same = [other for other in sorted(found) if other != name and found[other].shape == tensor.shape]
    if how == "swap" and same:
        other = rng.choice(same)
        found[name], found[other] = found[other], found[name]
    elif how == "dtype":
        found[name] = tensor.to(
            rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool])
        )
    elif how in ("nan", "inf") and tensor.is_floating_point():
        found[name] = tensor.clone()
        found[name].view(-1)[rng.randrange(tensor.numel())] = float(how)
    elif how == "zeros":
        found[name] = torch.zeros_like(tensor)
    elif how == "drop":
        del found[name]
    elif how == "extra":
        found[rng.choice(["x", "anchors.0.model.norm.weight", "stitch_bias.9", f"{name}_scale", "\x1b[2J"])] = (
            tensor.clone()
        )
    elif how == "rename":
        found[name + "x"] = found.pop(name)
    elif how == "shape":
        found[name] = rng.choice([tensor.flatten(), tensor.flatten()[:-1].contiguous(), torch.zeros(0), tensor[None]])
    else:
        found[name] = tensor * 1.001
    save_file({n: t.contiguous() for n, t in found.items()}, path, metadata={"format": "pt"})
    return f"{how} {name}"


def _stage(case, rng):
    """A save that seems interrupted, by another bundle's files or a link out of the folder."""
    stage, how = case / "bundle" / ".staged", rng.choice(["link", "file", "link inside", "no marker", "whole"])
    if how == "link":
        (case / "elsewhere").mkdir()
        (case / "elsewhere" / "COMPLETE").touch()
        (case / "elsewhere" / TABLE).write_text("{}")
        stage.symlink_to(case / "elsewhere")
    elif how == "file":
        stage.write_text("x")
    else:
        stage.mkdir()
        if how == "link inside":
            (stage / CONFIG).symlink_to(case / "anchors" / "0" / "config.json")
        else:
            shutil.copy(case / "anchors" / "0" / "config.json", stage / CONFIG)
        if how != "no marker":
            (stage / "COMPLETE").touch()
    return f"stage: {how}"


def _change(case, rng):
    """One change to the files of a case; says which."""
    bundle, anchor = case / "bundle", case / "anchors" / rng.choice("01")
    texts = [name for name in (CONFIG, TABLE, GENERATION, DIGESTS) if (bundle / name).is_file()]
    how = rng.random()
    if how < 0.3:
        name = rng.choice([CONFIG, *texts])
        return f"{name}: {edit_json(bundle / name, rng, EXTRA)}"
    if how < 0.5:
        return f"weights: {change_tensors(bundle / WEIGHTS, rng)}"
    if how < 0.7:
        name = rng.choice([*texts, WEIGHTS, WEIGHTS, WEIGHTS])
        return f"{name}: {edit_bytes(bundle / name, rng)}"
    if how < 0.75:
        first, second = rng.sample([*texts, WEIGHTS], 2)
        raw = (bundle / first).read_bytes()
        (bundle / first).write_bytes((bundle / second).read_bytes())
        (bundle / second).write_bytes(raw)
        return f"{first} and {second} swapped"
    if how < 0.8:
        return _stage(case, rng)
    if how < 0.87:
        return f"anchor weights: {edit_bytes(anchor / WEIGHTS, rng)}"
    if how < 0.92:
        return f"anchor weights: {change_tensors(anchor / WEIGHTS, rng)}"
    return f"anchor config: {edit_json(anchor / CONFIG, rng, EXTRA)}"


# ---- what is asked of it


def _command(arguments, may_change):
    """Runs a command: right, or one line and status 2; never control characters that came from a file."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    said = out.getvalue() + err.getvalue()
    if wrong := {c for c in said if c < " " and c not in "\n\t\r"} | {c for c in said if "\x7f" <= c <= "\x9f"}:
        raise Fault(f"raw control characters: {wrong}")
    if status:
        raise ValueError(err.getvalue().strip())
    if not may_change:
        raise Different(f"{arguments[1]} says nothing of the change: {out.getvalue()[:200]}")


def _load(case, original, kind, rng, honest):
    """Loads whole, by the Auto class, or one size, and compares logits with those that were saved."""
    expected = _expected(original / kind, kind)
    key = rng.choice(sorted(expected))
    how = rng.choice([{}, {}, {"stitch_id": key}, {"budget": 10**9}, "auto"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "auto":
            try:
                model = AUTO[kind].from_pretrained(case / "bundle")
            except (
                RecursionError,
                TypeError,
            ) as error:  # of Transformers' own reading of a config.json, before it knows our class
                *_, last = traceback.extract_tb(error.__traceback__)
                if isinstance(error, TypeError) and Path(last.filename).name != "configuration_auto.py":
                    raise
                raise ValueError(str(error)) from error
        else:
            model = CLASSES[kind].from_pretrained(case / "bundle", **how)
        found = _logits(model, kind) if honest else {}
    for name, logits in found.items():
        if not torch.equal(logits, expected[name]):
            raise Different(f"{how}: logits of {name} differ")


def cases(rng):
    """Endless cases; of half of them the digests are written anew, as whoever edits on purpose, or means harm, would."""
    while True:
        kind = rng.choice(["llama", "llama", "routes", "vit", "spaces"])
        signed, seed = rng.random() < 0.5, rng.random()
        if kind == "spaces":
            yield _space_case(rng, seed)
        else:
            yield _bundle_case(kind, signed, rng, seed)


def _bundle_case(kind, signed, rng, seed):
    import random

    ask = rng.choice(["load", "load", "load", "verify", "verify", "show", "json"])
    done = {}

    def mutate(case):
        source = case / kind
        for name in ("bundle", "anchors"):
            (source / name).rename(case / name)
        done["original"] = case.parents[1] / "bundles"
        own = random.Random(seed)
        (case / "bundle" / "evil.py").write_text(CODE)
        before = _recorded(case)
        done["how"] = _change(case, own)
        if signed and own.random() < 0.5:  # what comes through the first check may fail a later one
            with contextlib.suppress(ValueError, OSError, KeyError, SafetensorError):
                _change(case, own)
        done["changed"] = _recorded(case) != before
        if signed:
            with contextlib.suppress(ValueError, OSError):
                (case / "bundle" / DIGESTS).unlink(missing_ok=True)
                write_digests(case / "bundle", recorded_files(case / "bundle"))

    def check(case):
        honest = not signed
        if ask == "load":
            _load(case, done["original"], kind, rng, honest)
        elif ask == "verify":
            _command(["bundle", "verify", case / "bundle"], may_change=signed or not done["changed"])
        else:
            _command(["bundle", "show", case / "bundle", *(["--json"] if ask == "json" else [])], may_change=True)

    return f"{kind} {ask} {'signed' if signed else 'unsigned'} {seed}", mutate, check


def _recorded(case):
    """All that a bundle's logits, sizes and metrics come from."""
    homes = [case / "bundle" / name for name in (CONFIG, WEIGHTS, TABLE, GENERATION)]
    homes += [case / "anchors" / number / WEIGHTS for number in "01"]
    return [path.read_bytes() if path.is_file() else None for path in homes]


def _space_case(rng, seed):
    import random

    family = rng.choice(SPACES)

    def mutate(case):
        for number in "01":
            (case / "spaces" / family / number / "evil.py").write_text(CODE)
        own = random.Random(seed)
        edit_json(case / "spaces" / family / own.choice("01") / CONFIG, own, EXTRA)

    def check(case):
        given = (
            rng.choice([["--junctions", "aligned"], ["--routes", *ROUTES, "--adapter", "identity"], []])
            if family == "routes"
            else []
        )
        _command(["space", *(case / "spaces" / family / number for number in "01"), *given], may_change=True)

    return f"space {family} {seed}", mutate, check
