"""Recipes and commands as users start them: from an installed wheel in an empty folder, and from a checkout."""

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import make_dataclass

import pytest
from conftest import ROOT, ids_like, python
from transformers import AutoTokenizer

import stitched_llama
from stitched_llama import PSTConfig, StitchedLlamaForCausalLM, StitchTrainingArguments
from stitched_llama.cli import main
from stitched_llama.cli.recipes import RECIPES as COMMANDS
from stitched_llama.training import (
    Collator,
    InstructionDataset,
    batches,
    evaluate_stitches,
    is_published,
    read_rows,
    smoke_anchors,
    split_rows,
    template,
)

SMOKE = ("anchors", "data", "eval_data", "eval_size", "calibration_size", "max_length", "template")
SmokeArguments = make_dataclass("SmokeArguments", [(name, object, None) for name in SMOKE])
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("[!_]*.py"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What `pip install` leaves of this package, in a folder of its own."""
    folder = tmp_path_factory.mktemp("install")
    shutil.copytree(
        ROOT / "stitched_llama", folder / "source" / "stitched_llama", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("setup.cfg", "setup.py", "README.md"):
        shutil.copy(ROOT / name, folder / "source")
    how = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir"]
    python("-m", "pip", "wheel", *how, folder, folder / "source")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def readme_commands():
    """The commands of README's shell blocks, apart from make and pip, as words."""
    blocks = [part.split("```")[0] for part in (ROOT / "README.md").read_text().split("```bash\n")[1:]]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [command for command in words if command and command[0] not in ("make", "pip")]


def readme_finetune():
    """README's fine-tune as a smoke run on a CPU."""
    command = next(
        words for words in readme_commands() if words[:4] == ["accelerate", "launch", "-m", "stitched_llama"]
    )
    return [*command[3:], "--smoke", "--use_cpu", "--rank", "4", "--stitching_rank", "6"]


@pytest.fixture(scope="module")
def smoke(installed, tmp_path_factory):
    """That run, from the installed package, in an empty folder."""
    empty = tmp_path_factory.mktemp("empty")
    launch = ["-m", "accelerate.commands.launch", "-m"]
    done = python(*launch, *readme_finetune(), cwd=empty, PYTHONPATH=str(installed))
    return empty / "runs" / "alpaca", done.stdout


def test_the_readmes_commands_work_in_an_empty_folder(smoke, capsys, monkeypatch):
    """Those on a bundle as they stand, `chat` below; the others as far as their options, as what they read is on the Hub."""
    monkeypatch.chdir(smoke[0].parents[1])
    ran = []
    for command in readme_commands():
        launched = command[:3] == ["accelerate", "launch", "-m"]
        words = command[4:] if launched else command[1:]
        assert command[3 if launched else 0] in ("stitched_llama", "stitched-llama")
        if words[0] == "bundle":
            ran.append(words[1])
            assert main(words) == 0
        else:
            with pytest.raises(SystemExit):
                main([words[0], "--help"])
            told = capsys.readouterr().out.replace(",", " ").split()
            assert {word for word in words if word.startswith("--")} <= set(told), command
    assert ran == ["show", "verify"]


def test_the_readmes_chat_talks_over_the_bundle(smoke, installed):
    words = next(command[1:] for command in readme_commands() if command[:2] == ["stitched-llama", "chat"])
    lines = "hello\n/sizes\n/size 1M\n/size 3\nagain\n/quit\nnever\n"
    done = subprocess.run(
        [sys.executable, "-m", "stitched_llama", *words, "--max-new-tokens", "5"], input=lines, capture_output=True, text=True,
        cwd=smoke[0].parents[1], env={**os.environ, "PYTHONPATH": str(installed)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.splitlines()
    assert "/size 12B" in told[0]
    assert any(line.startswith("-> ") for line in told)
    assert sum(" parameters, stitch " in line for line in told) == 2
    assert any("too small" in line for line in told)


def test_a_command_says_its_version_and_what_it_does(capsys):
    for arguments in (
        ["--version"],
        ["--help"],
        *([name, "--help"] for name in ("space", "bundle", "chat", "export", *COMMANDS)),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code
        told = capsys.readouterr().out
        if arguments == ["--version"]:
            assert told == f"stitched-llama {stitched_llama.__version__}\n"
        elif len(arguments) > 1:
            keyed = "0[0:26]>1[33:40] runs blocks 0 to 25 of anchor 0" in " ".join(told.split())
            assert keyed == (arguments[0] != "shrink"), arguments  # which makes an anchor, no stitches
            assert len(told.split("\n\n")[1]) > 40, "no description"
    assert {f"{module}.py" for module, _ in COMMANDS.values()} == set(RECIPES)


def test_an_option_that_a_recipe_cannot_read_is_one_line(capsys):
    for words, named in (
        (["finetune", "--banana", "3"], "error: unknown arguments: --banana 3"),
        (["finetune", "--eta", "2", "--use_cpu"], "error: eta is 2.0; a moving average needs"),
        (["baseline-vision", "--data", "x"], "error: the following arguments are required: --anchors"),
    ):
        before = list(sys.argv)
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert named in capsys.readouterr().err.splitlines()[-1]
        assert sys.argv == before
    assert main(["baseline", "--anchors", "a", "--data", "none.json", "--use_cpu"]) == 2
    assert "stitched-llama: " in capsys.readouterr().err


def test_a_librarys_error_in_a_recipe_keeps_its_traceback(monkeypatch):
    def fails(*given, **how):
        json.loads("{")

    monkeypatch.setattr(runpy, "run_module", fails)
    with pytest.raises(json.JSONDecodeError):
        main(["finetune"])


def contents(folder):
    """Of all files but the pico anchors."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and "smoke" not in path.parts]
    return {path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_a_run_that_ended_is_resumed_by_doing_nothing(smoke, monkeypatch, caplog, capsys):
    monkeypatch.chdir(smoke[0].parents[1])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what --bf16 sets is undone after the test
    before, words = contents(smoke[0]), readme_finetune()[1:]
    assert words[0] == "finetune"
    assert main(words) == 0
    assert (
        "checkpoint-12 is the end of its run, runs/alpaca/bundle and runs/alpaca/result.json are of it" in caplog.text
    )
    for option, value, was in (("--eta", "0.5", "0.9"), ("--kernel_size", "2", "1"), ("--rank", "8", r"[4]")):
        assert main([*words, option, value]) == 2
        told = capsys.readouterr().err
        assert f"checkpoint-12 began with other settings: {option} {was} there" in told
    assert contents(smoke[0]) == before
    result = smoke[0] / "result.json"
    whole, anchors = result.read_text(), json.loads(result.read_text())["anchors"]
    how = (str(smoke[0] / "checkpoint-12"), smoke[0])
    assert is_published(*how, anchors)
    assert not is_published(*how, ["others", anchors[1]])
    assert not is_published(str(smoke[0] / "checkpoint-6"), smoke[0], anchors)
    for cut in (whole[:-9], json.dumps(json.loads(whole) | {"samples": None})):
        result.write_text(cut)
        assert not is_published(*how, anchors)
    result.write_text(whole)


def test_a_run_that_ended_before_it_was_published_trains_nothing(smoke, installed, tmp_path):
    folder = shutil.copytree(smoke[0].parents[1], tmp_path / "copy") / "runs" / "alpaca"
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "bundle")

    def checkpoints():
        return {path: held for path, held in contents(folder).items() if path.parts[0].startswith("checkpoint")}

    before = checkpoints()
    python("-m", *readme_finetune(), cwd=tmp_path / "copy", PYTHONPATH=str(installed))
    assert checkpoints() == before
    for name in ("model.safetensors", "stitches.json"):
        assert (folder / "bundle" / name).read_bytes() == (smoke[0] / "bundle" / name).read_bytes(), name
    assert json.loads((folder / "result.json").read_text())["steps"] == 12


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
        assert set(stitch["metrics"]) == {
            "loss", "loss_test", "loss_before", "exact_match", "exact_match_test", "exact_match_before", "loss_test_before",
            "exact_match_test_before",
        }, stitch["key"]  # fmt: skip
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
    losses = evaluate_stitches(model, batches(part, Collator(0), 8), list(found), progress=False, split=True)["loss"]
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


@pytest.mark.filterwarnings("ignore:.*junctions do not fit", "ignore:.*the ridge decides")
def test_what_the_readme_does_by_hand_works(anchors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "guide.md").read_text().split("in lines of your own:\n\n```python\n")[1].split("```")[0]
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


def test_the_recipes_of_a_checkout_are_those_of_the_package():
    assert (ROOT / "recipes").samefile(ROOT / "stitched_llama" / "recipes")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_refuses_to_be_imported(name):
    with pytest.raises(ImportError, match="run or copied, not imported"):
        runpy.run_path(str(ROOT / "recipes" / name), run_name="recipe")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_and_opens_with_its_command(name):
    text = (ROOT / "recipes" / name).read_text()
    assert len(text.splitlines()) < 200
    assert f"recipes/{name}" in text.split('"""')[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--load_in_4bit"], "^--load_in_4bit needs a GPU to train"),
        (["--full"], "which 8 or 4 bits cannot: add --no_load_in_8bit$"),
    ],
)
def test_the_recipe_says_what_it_cannot_train(options, named, tmp_path):
    with pytest.raises(SystemExit, match=named):
        main(["finetune", "--smoke", *options, "--use_cpu", "--output_dir", str(tmp_path)])


def test_the_vision_recipe_measures_no_junctions(tmp_path, capsys):
    for words in (["--junctions", "similar"], ["--routes", "greedy"]):
        with pytest.raises(SystemExit):
            main(["finetune-vision", "--anchors", "a", "b", "--data", "c.npz", *words, "--output_dir", str(tmp_path)])
        assert "measure text anchors: give junctions or routes one by one" in capsys.readouterr().err


def test_a_checkouts_recipe_says_that_it_needs_two_anchors(tmp_path):
    done = python("recipes/finetune_alpaca.py", "--anchors", "one", "--output_dir", tmp_path, check=False)
    assert done.returncode != 0
    assert "--anchors SMALL LARGE is needed: two or more" in done.stderr
