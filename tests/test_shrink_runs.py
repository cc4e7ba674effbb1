"""Shrinking that goes wrong: what is not finite, damaged, interrupted or of others stops it by name, and nothing is lost."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ids_like
from test_no_code import plant
from test_shrink import large
from transformers import TrainerCallback

from stitched_llama.shrinking import (
    ShrinkArguments,
    ShrinkDistillation,
    ShrinkTrainer,
    TokenBlocks,
    check_lineage,
    cut_model,
    row_renderer,
    save_shrunk,
)
from stitched_llama.training import Row, SpaceArguments, find_checkpoint, measured_options

ROOT = Path(__file__).parents[1]
TEXT = [f"The river {number} runs by the hill {number % 7}." for number in range(60)]


def trainer(folder, tokenizer, callbacks=None, teacher=None, data=None, **options):
    torch.manual_seed(0)
    teacher = teacher or large()
    cut = cut_model(teacher, 3)
    arguments = {
        "max_steps": 3, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
        "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "lr_scheduler_kwargs": None, "dataloader_pin_memory": False,
    } | options  # fmt: skip
    return ShrinkTrainer(
        model=ShrinkDistillation(cut.model, teacher, cut.target_blocks), args=ShrinkArguments(str(folder), **arguments),
        train_dataset=TokenBlocks(TEXT, tokenizer, 16, 40), eval_dataset=TokenBlocks(TEXT, tokenizer, 16, 2, seed=3),
        callbacks=callbacks, data_settings=data,
    )  # fmt: skip


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    """A finished run of three steps, and what it trained."""
    folder = tmp_path_factory.mktemp("shrink")
    made = trainer(folder, tokenizer)
    made.train()
    return folder, {name: tensor.clone() for name, tensor in made.model.state_dict().items()}


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "run")


def test_what_is_not_finite_ends_the_run_and_checkpoints_stand(tokenizer, tmp_path):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.student.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")

    made = trainer(tmp_path, tokenizer, [Break()])
    with pytest.raises(ValueError, match="step 3: the gradient is not finite on rows .* of the training set"):
        made.train()
    assert find_checkpoint("auto", str(tmp_path), bundles=False) == str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="loss on held-out data is nan"):
        made.evaluate()
    with pytest.raises(ValueError, match="up_proj.weight of the small model holds 1 of"):
        save_shrunk(made.model, tmp_path / "small", "large")
    assert not (tmp_path / "small").exists()


def test_the_end_of_a_run_is_resumed_by_training_nothing(whole, folder, tokenizer):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    made = trainer(folder, tokenizer)
    assert made.train(resume_from_checkpoint="auto").global_step == 3
    assert equal(made.model.state_dict(), whole[1])
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "run.json"]
)
def test_auto_passes_over_what_is_damaged(name, whole, folder, tokenizer, caplog):
    path = folder / "checkpoint-3" / name
    path.write_bytes(path.read_bytes()[:-3])
    made = trainer(folder, tokenizer)
    made.train(resume_from_checkpoint="auto")
    assert "checkpoint-2 is taken" in caplog.text
    assert f"{name} changed" in caplog.text
    assert equal(made.model.state_dict(), whole[1])
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no whole checkpoint: .* changed"):
        made.train(resume_from_checkpoint=str(path.parent))


def test_checkpoints_of_another_run_are_refused(folder, tokenizer, tmp_path):
    other = large()
    other.model.layers[1].mlp.up_proj.weight.data += 1e-3  # its samples
    for how, named in (
        ({"learning_rate": 1e-3}, "--learning_rate 0.01 there, 0.001 here"),
        ({"alignment_weight": 0.0}, "--alignment_weight 2.0 there"),
        ({"mixed_share": 0.1}, "--mixed_share 0.5 there"),
        ({"max_steps": 9}, "--max_steps 3 there"),
        ({"teacher": other}, "--large_digest"),
    ):
        with pytest.raises(ValueError, match=named):
            trainer(folder, tokenizer, **how).train(resume_from_checkpoint="auto")
    trainer(tmp_path / "other", tokenizer, data={"block_size": 16}, max_steps=1).train()
    made = trainer(tmp_path / "other", tokenizer, data={"block_size": 32}, max_steps=1)
    with pytest.raises(ValueError, match="--block_size 16 there, 32 here"):
        made.train(resume_from_checkpoint="auto")
    alone = trainer(tmp_path / "alone", tokenizer, save_only_model=True, max_steps=1)
    alone.train()
    with pytest.raises(ValueError, match="would write over them: .*: it was saved without optimizer.pt"):
        trainer(tmp_path / "alone", tokenizer, max_steps=1).train(resume_from_checkpoint="auto")


def test_sigterm_saves_a_checkpoint_from_which_the_run_goes_on(whole, tokenizer, tmp_path):
    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            made.interruption.received = state.global_step == 1

    made = trainer(tmp_path, tokenizer, [Signal()], save_strategy="no")
    with pytest.raises(SystemExit) as ended:
        made.train()
    assert ended.value.code == 143
    again = trainer(tmp_path, tokenizer)
    again.train(resume_from_checkpoint="auto")
    assert equal(again.model.state_dict(), whole[1])


def test_no_file_of_a_run_holds_the_token(tokenizer, tmp_path):
    trainer(tmp_path, tokenizer, max_steps=1, hub_token="hf_abcdefghijklmnopqrstuv").train()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_abcdefghijklmno" in path.read_bytes()]


def test_ways_to_train_that_are_not_supported_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="push_to_hub would upload checkpoints"):
        trainer(tmp_path, tokenizer, push_to_hub=True, hub_token="x")
    made = trainer(tmp_path, tokenizer)
    made.args._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs in one process"):
        ShrinkTrainer(model=made.model, args=made.args)


def test_a_small_model_is_saved_whole_and_not_over_the_large_one(tmp_path, monkeypatch):
    teacher = large()
    cut = cut_model(teacher, 3)
    made = ShrinkDistillation(cut.model, teacher, cut.target_blocks)
    save_shrunk(made, tmp_path / "small", "large")
    before = {path: path.read_bytes() for path in (tmp_path / "small").iterdir()}
    cut.model.model.norm.weight.data += 1
    with monkeypatch.context() as patch:
        patch.setattr("stitched_llama.shrinking.save._CARD", "{never}")  # fails once the weights are written
        with pytest.raises(KeyError):
            save_shrunk(made, tmp_path / "small", "large")
    assert before == {path: path.read_bytes() for path in (tmp_path / "small").iterdir()}
    with pytest.raises(ValueError, match="is the folder of the model that is cut"):
        save_shrunk(made, tmp_path / "small", str(tmp_path / "small"))


def test_a_student_that_is_not_of_this_teacher_is_refused():
    teacher = large()
    cut = cut_model(teacher, 3)
    cut.model.config.shrunk_from = {"depth": 5, "target_blocks": cut.target_blocks, "shared": 3}
    with pytest.raises(ValueError, match="shared in shrunk_from of the config is 3"):
        check_lineage(cut.model, cut, teacher)
    cut.model.model.embed_tokens.weight.data[3, 5] += 1
    with pytest.raises(ValueError, match="embedding or head of the student .* is not the teacher's"):
        ShrinkDistillation(cut.model, teacher, cut.target_blocks)
    assert ShrinkDistillation(cut.model, teacher, cut.target_blocks, freeze_embeddings=False)


def test_a_document_of_megabytes_is_read_in_pieces_to_the_same_ids(tokenizer, monkeypatch):
    texts = ["word " * 100_000, "x" * 70_000, "the end"]
    wanted = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False).input_ids, 2]]
    assert TokenBlocks(texts[:1], tokenizer, 100).blocks.flatten().tolist() == wanted[:500_000]
    read, original = [], type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, text, **how: read.append(len(text)) or original(self, text, **how)
    )
    blocks = TokenBlocks(texts[:1], tokenizer, 100, max_blocks=300).blocks
    assert blocks.flatten().tolist() == wanted[:30_000]
    assert sum(read) < 60_000
    assert len(TokenBlocks(texts[1:2], tokenizer, 100).blocks) == 700


def test_tokens_and_templates_that_cannot_be_are_named(tokenizer):
    with pytest.raises(ValueError, match="is outside the 90 of the vocabulary"):
        TokenBlocks(TEXT, tokenizer, 16, vocab_size=90)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="the chat template does not take this conversation: no"):
        row_renderer(tokenizer)(Row("a", "", "b"))
    tokenizer.chat_template = None


# ---- the recipe


@pytest.fixture
def source(tokenizer, tmp_path):
    """A large model and text."""
    large().save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT))
    return tmp_path


def shrink(folder, monkeypatch, *arguments, output="small"):
    options = {
        "large": folder / "large", "data": folder / "text.txt", "output_dir": folder / output, "depth": 3, "block_size": 16,
        "eval_blocks": 2, "max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1,
    }  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", ["shrink", *words, "--use_cpu", "--disable_tqdm", "True", *map(str, arguments)])
    runpy.run_module("stitched_llama.recipes.shrink", run_name="__main__")


def test_a_shrink_is_resumed_to_the_same_files(source, monkeypatch):
    shrink(source, monkeypatch)
    weights = (source / "small" / "model.safetensors").read_bytes()
    shutil.rmtree(source / "small" / "checkpoint-2")
    shrink(source, monkeypatch, "--resume", "auto")
    shrink(source, monkeypatch, "--resume", "auto")  # of which nothing is left to train
    assert (source / "small" / "model.safetensors").read_bytes() == weights
    for change in (["--mixed_share", "0.1"], ["--eval_blocks", "3"]):
        with pytest.raises(ValueError, match=f"began with other settings: {change[0]}"):
            shrink(source, monkeypatch, "--resume", "auto", *change)
    with pytest.raises(ValueError, match="is the folder of the model that is cut"):
        shrink(source, monkeypatch, output="large")
    with pytest.raises(ValueError, match="fsdp is asked for"):
        shrink(source, monkeypatch, "--fsdp", "full_shard")


@pytest.mark.parametrize("kind", ["adapter", "kernel", "code", "lacks a tensor"])
def test_a_large_model_that_is_not_what_it_seems_is_refused_before_it_is_cut_or_measured(kind, source, monkeypatch):
    folder, marker = source / "large", None
    config = json.loads((folder / "config.json").read_text())
    if kind == "adapter":
        (folder / "adapter_config.json").write_text("{}")
        named = "holds an adapter"
    elif kind == "kernel":
        (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "someone/kernels"}))
        named = "which may be code from elsewhere"
    elif kind == "code":
        marker, named = plant(folder, source, model_type="evil"), "model_type 'evil' is not supported"
    else:
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
        named = "lacks 9 tensors"
    with pytest.raises(ValueError, match=named):
        shrink(source, monkeypatch)
    shutil.copytree(folder, source / "small")
    ids = ids_like(2, 9)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    for options in (SpaceArguments(routes=["greedy"]), SpaceArguments(junctions=["similar"])):
        with pytest.raises(ValueError, match=named):
            measured_options(options, [str(source / "small"), str(folder)], [batch], progress=False)
    assert marker is None or not marker.exists()
