"""A run that goes on: from the newest whole checkpoint, with the settings it began with, or not at all."""

import json
import shutil

import pytest
import torch
from fuzzing_kills import kill_and_compare
from tiny_runs import ROWS, dataset, stitched_model, trained, trainer

from stitched_llama.bundles import DIGESTS, write_digests
from stitched_llama.training import find_checkpoint, is_published, run_settings
from stitched_llama.training.settings import MAY_CHANGE

SAVES = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def run(anchors, tmp_path_factory):
    made = trainer(stitched_model(anchors["unequal"]), tmp_path_factory.mktemp("run"), **SAVES)
    made.train()
    return made


@pytest.fixture
def folder(run, tmp_path):
    """A copy of that run's folder: checkpoints 2 and 4."""
    return shutil.copytree(run.args.output_dir, tmp_path / "run")


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_end_of_a_run_is_resumed_by_training_nothing(run, folder, anchors):
    before = contents(folder)
    again = trainer(stitched_model(anchors["unequal"], seed=9), folder, **SAVES)
    again.args.output_dir = str(folder)
    done = again.train(resume_from_checkpoint=True)
    assert (done.global_step, again.drawn) == (4, {})
    assert contents(folder) == before
    assert all(torch.equal(tensor, trained(run.model)[name]) for name, tensor in trained(again.model).items())
    assert again.importance == run.importance


FILES = [
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "model.safetensors",
    "stitches.json",
    "run.json",
]


@pytest.mark.parametrize("name", FILES)
def test_auto_passes_over_what_is_damaged_and_says_so(name, folder, caplog):
    file = folder / "checkpoint-4" / name
    raw = file.read_bytes()
    changed = bytearray(raw)
    changed[len(raw) // 2] ^= 1
    for content in (b"", raw[: len(raw) // 2], bytes(changed), None):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        caplog.clear()
        assert find_checkpoint("auto", str(folder)) == str(folder / "checkpoint-2"), content
        assert f"checkpoint-2 is taken; {file.parent} is passed over: " in caplog.text
        assert name in caplog.text.split("passed over")[1]
        with pytest.raises(ValueError, match=rf"checkpoint-4 holds no whole checkpoint: .*{name}"):
            find_checkpoint(str(file.parent), str(folder))
    file.write_bytes(raw)
    assert find_checkpoint("auto", str(folder)) == str(folder / "checkpoint-4")


def test_a_save_that_was_cut_short_is_no_checkpoint(folder, caplog):
    shutil.rmtree(folder / "checkpoint-2")
    (folder / "checkpoint-4" / DIGESTS).unlink()
    assert find_checkpoint("auto", str(folder)) is None
    assert "the run begins with step 1" in caplog.text
    assert "checkpoint-4: its save was cut short" in caplog.text
    write_digests(
        folder / "checkpoint-4", ["model.safetensors", "config.json", "stitches.json"]
    )  # as a bundle has them
    assert find_checkpoint("auto", str(folder)) is None
    with pytest.raises(ValueError, match="checkpoint-4 holds no whole checkpoint: its save was cut short"):
        find_checkpoint(str(folder / "checkpoint-4"), str(folder))


def test_models_alone_are_not_resumed_and_not_written_over(anchors, tmp_path):
    options = SAVES | {"save_only_model": True}
    trainer(stitched_model(anchors["unequal"]), tmp_path, **options).train()
    before = contents(tmp_path)
    for resume in ("auto", str(tmp_path / "checkpoint-2")):
        with pytest.raises(
            ValueError, match=r"saved without optimizer.pt, scheduler.pt, rng_state.pth \(save_only_model\)"
        ):
            find_checkpoint(resume, str(tmp_path))
        with pytest.raises(ValueError, match="save_only_model"):
            trainer(stitched_model(anchors["unequal"]), tmp_path, **SAVES).train(
                resume_from_checkpoint=resume == "auto" or resume
            )
    assert contents(tmp_path) == before


CHANGES = {
    "learning_rate": 5e-3, "eta": 0.5, "sampling": "uniform", "importance": "snip", "anchor_share": 0.5, "floor": 0.1,
    "interval_count": 2, "distillation": "soft", "per_device_train_batch_size": 4, "max_steps": 6, "seed": 3, "weight_decay": 0.1,
    "lr_scheduler_type": "constant", "bf16": True, "max_grad_norm": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), CHANGES.items())
def test_a_setting_that_changes_the_run_is_refused_by_name(name, value, folder, anchors):
    again = trainer(stitched_model(anchors["unequal"]), folder, **SAVES | {name: value})
    with pytest.raises(ValueError, match=rf"checkpoint-2 began with other settings: .*--{name} .* there, {value} here"):
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_rows_and_further_settings_are_compared_too(folder, anchors):
    checkpoint = str(folder / "checkpoint-2")
    again = trainer(stitched_model(anchors["unequal"]), folder, **SAVES)
    again.train_dataset = dataset(ROWS[::-1])
    with pytest.raises(ValueError, match=r"other settings: --rows_digest \w+ there, \w+ here"):
        again.train(resume_from_checkpoint=checkpoint)
    again = trainer(stitched_model(anchors["unequal"]), folder, **SAVES, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="train_sampling_strategy"):
        again.train(resume_from_checkpoint=checkpoint)


def test_a_result_that_is_none_is_of_no_finished_run(folder, tmp_path):
    (tmp_path / "bundle").mkdir()
    shutil.copy(folder / "checkpoint-4" / "model.safetensors", tmp_path / "bundle")
    for text, done in (
        ('{"anchors": ["a", "b"]}', True),
        ('{"anchors": ["a"]}', False),
        ("[]", False),
        ("{}", False),
        ("{", False),
    ):
        (tmp_path / "result.json").write_text(text)
        assert is_published(str(folder / "checkpoint-4"), tmp_path, ["a", "b"]) == done


def test_how_rows_are_read_is_compared_too(anchors, tmp_path):
    """What the recipes hand over: options of the data, the space and PST."""
    began = {"max_length": 48, "template": "short", "routes": None, "stitch_rank": 0}
    trainer(stitched_model(anchors["unequal"]), tmp_path, data_settings=began, **SAVES | {"max_steps": 2}).train()
    for name, value in {"max_length": 40, "template": "alpaca", "routes": ["greedy"], "stitch_rank": 2}.items():
        again = trainer(
            stitched_model(anchors["unequal"]),
            tmp_path,
            data_settings=began | {name: value},
            **SAVES | {"max_steps": 2},
        )
        with pytest.raises(ValueError, match=f"began with other settings: --{name} {began[name]} there"):
            again.train(resume_from_checkpoint=True)


def test_what_is_logged_evaluated_or_saved_may_differ(run, folder, anchors):
    others = {"logging_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 3}
    again = trainer(stitched_model(anchors["unequal"], seed=9), folder, **SAVES | others, dataloader_num_workers=1)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert all(torch.equal(tensor, trained(run.model)[name]) for name, tensor in trained(again.model).items())
    assert set(run_settings(run.args)) <= set(json.loads((folder / "checkpoint-4" / "run.json").read_text()))
    assert all(hasattr(run.args, name) for name in MAY_CHANGE - {"anchors", "resume", "baselines", "budgets", "smoke"})


def test_older_checkpoints_go_once_the_newest_is_whole(anchors, tmp_path, monkeypatch):
    made = trainer(stitched_model(anchors["unequal"]), tmp_path, **SAVES | {"save_steps": 1, "save_total_limit": 1})
    seen, write = [], write_digests

    def watched(folder, names):
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        write(folder, names)

    monkeypatch.setattr("stitched_llama.training.checkpoints.write_digests", watched)
    made.train()
    assert seen == [
        ["checkpoint-1"],
        ["checkpoint-1", "checkpoint-2"],
        ["checkpoint-2", "checkpoint-3"],
        ["checkpoint-3", "checkpoint-4"],
    ]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert made.args.save_total_limit == 1


@pytest.mark.parametrize("number", [1, 2])
def test_a_killed_run_ends_as_one_that_was_not(number, tmp_path):
    kill_and_compare(tmp_path, seed=number)
