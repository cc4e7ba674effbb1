"""Recipes as users start them: the smoke run end to end, the chat over its bundle, and no recipe is imported."""

import json
import runpy
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import make_dataclass

import pytest
from conftest import ROOT, ids_like, python
from transformers import AutoTokenizer

from stitched_llama import PSTConfig, StitchedLlamaForCausalLM, StitchTrainingArguments
from stitched_llama.training import (
    Collator,
    InstructionDataset,
    batches,
    evaluate_stitches,
    read_rows,
    smoke_anchors,
    split_rows,
    template,
)

SMOKE = ("anchors", "data", "eval_data", "eval_size", "calibration_size", "max_length", "template")
SmokeArguments = make_dataclass("SmokeArguments", [(name, object, None) for name in SMOKE])
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.py"))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke run, started as the README says, with ranks of its own."""
    folder = tmp_path_factory.mktemp("smoke")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    done = python(
        *launch, "recipes/finetune_alpaca.py", "--smoke", "--output_dir", folder, "--report_to", "tensorboard",
        "--rank", 4, "--stitching_rank", 6,
    )  # fmt: skip
    return folder, done.stdout


def test_smoke_leaves_bundle_plot_table_and_row(smoke):
    folder, told = smoke
    assert (folder / "stitches.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "stitches.png").stat().st_size > 10_000
    row = json.loads((folder / "result.json").read_text())
    keys = [stitch["key"] for stitch in row["table"]["stitches"]]
    assert len(keys) == 6
    assert row["steps"] == 12
    assert row["held_out_rows"] == 16
    assert row["train_rows"] == 288 - 16
    for stitch in row["table"]["stitches"]:
        assert set(stitch["metrics"]) == {"loss", "loss_before", "exact_match", "exact_match_before"}, stitch["key"]
        assert stitch["metrics"]["loss"] < stitch["metrics"]["loss_before"]
    assert row["table"]["metric"] == "loss"
    assert any(stitch["published"] for stitch in row["table"]["stitches"])
    assert set(row["calibration"]["loss"]) == set(keys)
    assert row["calibration"]["r2"]
    assert len(row["samples"]) == 3
    assert all(len(sample["answers"]) == 3 for sample in row["samples"])
    sizes = [size.split(",")[0] for size in row["samples"][0]["answers"]]
    assert sizes[0] == "stitch 0"
    assert len(set(sizes)) == 3
    table = (folder / "table.txt").read_text()
    assert all(key in table and key in told for key in keys)
    assert "trainable params" in told
    assert list(folder.rglob("events.out.tfevents.*")), "nothing for TensorBoard"
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-12"}


def test_smoke_bundle_loads_in_the_8_bits_it_was_trained_in(smoke):
    model = StitchedLlamaForCausalLM.from_pretrained(smoke[0] / "bundle")
    assert model.table.metric == "loss"
    assert model.config.pst_config == PSTConfig(rank=4, stitching_rank=6)
    assert set(model.table.metrics["loss"]) == set(model.keys)
    assert set(model.table.importance) <= set(model.keys)
    assert model.table.importance
    assert {path.name for path in (smoke[0] / "bundle").iterdir()} >= {
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
    }


def test_anchors_tuned_alone_are_stitched_as_they_were_measured(anchors, tmp_path):
    """Adapt-then-stitch on text: what `--save` leaves are anchors, with the tuned weights merged."""
    data, saved = tmp_path / "rows.json", tmp_path / "adapted"
    data.write_text(json.dumps([{"instruction": f"say {i}", "input": "", "output": f"{i} {i}"} for i in range(40)]))
    told = python(
        "recipes/lora_baseline.py", "--anchors", *anchors["unequal"], "--data", data, "--eval_size", 8, "--template", "short",
        "--max_length", 48, "--max_steps", 4, "--learning_rate", 0.02, "--per_device_train_batch_size", 8, "--global_batch_size",
        8, "--use_cpu", "--report_to", "none", "--output_dir", tmp_path, "--rows", tmp_path / "rows", "--save", saved,
    ).stdout  # fmt: skip
    found = json.loads((tmp_path / "rows").read_text())
    assert json.loads(told.splitlines()[-1]) == found
    model = StitchedLlamaForCausalLM.from_anchors([saved / "0", saved / "1"])
    tokenizer = AutoTokenizer.from_pretrained(saved / "0")
    held_out = split_rows(read_rows(str(data)), 8, seed=StitchTrainingArguments("").seed)[1]
    part = InstructionDataset(held_out, tokenizer, template("short", tokenizer), 48)
    losses = evaluate_stitches(model, batches(part, Collator(0), 8), list(found), progress=False)["loss"]
    for key, row in found.items():
        assert losses[key] == pytest.approx(row["loss"], rel=1e-4)
        assert row["loss"] < row["loss_before"] - 0.01


@pytest.mark.parametrize(("rows", "wanted"), [(4, 8), (16, 16), (3, 6)])
def test_smoke_takes_batches_of_any_size(rows, wanted, tmp_path):
    training = StitchTrainingArguments(
        str(tmp_path), per_device_train_batch_size=rows, global_batch_size=0, use_cpu=True
    )
    args, training = smoke_anchors(SmokeArguments(), training)
    assert rows * training.gradient_accumulation_steps == wanted
    assert all((tmp_path / "smoke" / name / "model.safetensors").is_file() for name in ("small", "large"))


def test_smoke_is_written_by_one_process_of_a_node_and_others_wait(tmp_path, monkeypatch):
    waited = []

    @contextmanager
    def first(self, **how):
        waited.append(self.local_process_index)
        yield

    monkeypatch.setattr(StitchTrainingArguments, "local_process_index", property(lambda self: 1))
    monkeypatch.setattr(StitchTrainingArguments, "main_process_first", first)
    smoke_anchors(SmokeArguments(), StitchTrainingArguments(str(tmp_path), use_cpu=True))
    assert waited == [1]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_chat_recipe_talks_over_the_bundle(smoke):
    lines = "hello\n/sizes\n/size 1M\n/size 3\nagain\n/quit\nnever\n"
    done = subprocess.run(
        [sys.executable, "recipes/chat.py", str(smoke[0] / "bundle"), "--max-new-tokens", "5"],
        input=lines, capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.splitlines()
    assert "/size 12B" in told[0]
    assert any(line.startswith("-> ") for line in told)
    assert sum(" parameters, stitch " in line for line in told) == 2
    assert any("too small" in line for line in told)


@pytest.mark.filterwarnings("ignore:.*junctions do not fit", "ignore:.*the ridge decides")
def test_what_the_readme_does_by_hand_works(anchors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text().split("By hand:\n```python\n")[1].split("```")[0]
    rows = [{"instruction": f"say {number}", "output": str(number)} for number in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, {"instruction": "nothing", "output": ""}]))
    for name, own in (
        ("huggyllama/llama-7b", anchors["unequal"][0]),
        ("huggyllama/llama-13b", anchors["unequal"][1]),
        ("tatsu-lab/alpaca", "rows.json"),
        ("500, seed", "8, seed"),
        ("stitch_id=40", "stitch_id=5"),
    ):
        assert text.count(name) == 1, name
        text = text.replace(name, own)
    scope = {"prompt": {"input_ids": ids_like(1, 5), "max_new_tokens": 3}}
    exec(text, scope)  # as a reader would
    assert set(scope["found"]["loss"]) == set(scope["model"].keys)
    assert scope["small"].keys == [scope["model"].choose("9B").key]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_refuses_to_be_imported(name):
    with pytest.raises(ImportError, match="run or copied, not imported"):
        runpy.run_path(str(ROOT / "recipes" / name), run_name="recipe")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_and_opens_with_its_command(name):
    text = (ROOT / "recipes" / name).read_text()
    assert len(text.splitlines()) < 200
    assert f"recipes/{name}" in text.split('"""')[1]


def test_the_recipe_says_that_4_bits_need_a_gpu(tmp_path):
    done = python(
        "recipes/finetune_alpaca.py", "--smoke", "--load_in_4bit", "--use_cpu", "--output_dir", tmp_path, check=False
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("--load_in_4bit needs a GPU to train")


def test_the_recipe_says_that_quantised_anchors_do_not_train_whole(tmp_path):
    done = python("recipes/finetune_alpaca.py", "--smoke", "--full", "--use_cpu", "--output_dir", tmp_path, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith("which 8 or 4 bits cannot: add --no_load_in_8bit")


def test_the_recipe_says_that_it_needs_two_anchors(tmp_path):
    done = python("recipes/finetune_alpaca.py", "--anchors", "one", "--output_dir", tmp_path, check=False)
    assert done.returncode != 0
    assert "--anchors SMALL LARGE is needed: two or more" in done.stderr
