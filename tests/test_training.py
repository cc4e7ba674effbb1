"""Whole runs: accumulation, resume, ranks, checkpoints, logs, and every option once."""

import contextlib
import io
import json
import re
import shutil
from collections import Counter
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, fresh, ids_like, python, spread
from safetensors import safe_open
from tiny_runs import DEFAULTS, ROWS, dataset, evaluated, stitched_model, trained, trainer
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from stitched_llama import PSTConfig, StitchTrainer, StitchTrainingArguments
from stitched_llama.bundles import Bundle
from stitched_llama.cli import main
from stitched_llama.sampling import SCHEMES, SCORES, Importance, StepSignals, StitchSampler
from stitched_llama.training import (
    Collator,
    ImageTrainingArguments,
    check_arguments,
    check_settings,
    find_checkpoint,
    pico_anchor,
    plot_stitches,
    read_baselines,
)
from stitched_llama.training import trainer as trainer_module
from stitched_llama.training.checks import check_checkpoint, check_run

IDS = ids_like(2, 9)


def run(folders, output, seed=0, resume=None, **options):
    made = trainer(stitched_model(folders, seed), output, **options)
    made.train(resume_from_checkpoint=resume)
    return made


def assert_close(one, other, **tolerance):
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def whole(anchors, tmp_path_factory):
    """Six steps of eight rows without a break, a checkpoint every three; stitches and anchors."""
    made = run(anchors["unequal"], tmp_path_factory.mktemp("whole"), max_steps=6, save_strategy="steps", save_steps=3)
    assert {stitch.is_anchor for stitch in made.drawn.values()} == {True, False}
    return made


def test_training_changes_trained_parts_and_never_the_anchors(whole, anchors):
    before = stitched_model(anchors["unequal"])
    start, end = dict(before.named_parameters()), dict(whole.model.named_parameters())
    for name in start:
        if not start[name].requires_grad:
            assert torch.equal(start[name], end[name]), name
    for key in before.keys:
        name = f"stitch_bias.vectors.{key}"
        drawn = key in {stitch.key for stitch in whole.drawn.values()}
        assert torch.equal(start[name], end[name]) != drawn, "it drifted without a draw"
    assert whole.importance.visits == Counter(s.key for s in whole.drawn.values() if not s.is_anchor)
    assert all(
        not torch.equal(start[n], end[n])
        for n, p in before.named_parameters()
        if p.requires_grad and n.startswith("anchors.1")
    )


def test_training_lowers_the_loss(anchors, tmp_path):
    made = trainer(stitched_model(anchors["unequal"]), tmp_path, max_steps=40, learning_rate=2e-2, sampling="uniform")
    before = evaluated(made.model)["loss"]
    made.train()
    after = evaluated(made.model)["loss"]
    assert sum(after.values()) < 0.9 * sum(before.values())
    assert all(after[key] < before[key] for key in after)


@pytest.mark.parametrize("distillation", ["hard", "soft"])
def test_accumulation_of_8_times_1_equals_1_times_8(distillation, anchors, tmp_path):
    one, eight = (
        run(anchors["unequal"], tmp_path / str(size), per_device_train_batch_size=size, distillation=distillation)
        for size in (8, 1)
    )
    assert (one.args.gradient_accumulation_steps, eight.args.gradient_accumulation_steps) == (1, 8)
    assert_close(trained(one.model), trained(eight.model), atol=2e-4, rtol=1e-3)
    assert one.importance.visits == eight.importance.visits != {}
    assert one.importance.averages == pytest.approx(eight.importance.averages, rel=1e-3)
    for left, right in zip(one.state.log_history, eight.state.log_history):
        for name in left:
            if name.startswith("loss"):
                assert left[name] == pytest.approx(right[name], rel=1e-3), name


def test_nothing_of_a_step_that_did_not_fit_counts(anchors, tmp_path, monkeypatch):
    """Trainer starts anew with smaller batches after a GPU ran out of memory, here in the second half of the first step."""
    options = {"per_device_train_batch_size": 4, "global_batch_size": 0, "gradient_accumulation_steps": 2}
    model = stitched_model(anchors["unequal"])
    run = trainer(model, tmp_path, auto_find_batch_size=True, **options)
    calls, learn = [], run._train_student

    def fails_once(*given):
        calls.append(len(given[2]["input_ids"]))
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return learn(*given)

    monkeypatch.setattr(run, "_train_student", fails_once)
    run.train()
    smaller = calls[2]
    assert calls[:2] == [4, 4]
    assert smaller < 4
    options["per_device_train_batch_size"] = smaller
    plain = trainer(stitched_model(anchors["unequal"]), tmp_path, **options)
    plain.train()
    assert_close(trained(model), trained(plain.model), atol=0, rtol=0)
    assert run.importance.averages == plain.importance.averages


def test_activation_checkpointing_changes_nothing(anchors, tmp_path):
    plain, checked = (run(anchors["unequal"], tmp_path / str(on), activation_checkpointing=on) for on in (False, True))
    assert_close(trained(plain.model), trained(checked.model), atol=1e-4, rtol=1e-3)


def test_resume_continues_bit_for_bit(whole, anchors, tmp_path):
    shutil.copytree(f"{whole.args.output_dir}/checkpoint-3", tmp_path / "checkpoint-3")
    resume = find_checkpoint("auto", str(tmp_path))
    assert "importance" in (tmp_path / "checkpoint-3" / "stitches.json").read_text().split('"stitches"')[1]
    again = run(anchors["unequal"], tmp_path, seed=9, resume=resume, max_steps=6, save_strategy="steps", save_steps=3)
    assert again.state.global_step == 6
    assert_close(trained(again.model), trained(whole.model), atol=0, rtol=0)
    assert again.importance.averages == whole.importance.averages
    for name in ("model.safetensors", "stitches.json"):
        wanted = (ROOT / whole.args.output_dir / "checkpoint-6" / name).read_bytes()
        assert (tmp_path / "checkpoint-6" / name).read_bytes() == wanted, name


def test_a_checkpoint_holds_trained_parts_only(whole):
    with safe_open(f"{whole.args.output_dir}/checkpoint-3/model.safetensors", "pt") as file:
        names = list(file.keys())
    assert names
    assert all("lora_" in n or n.startswith(("stitching_layers.", "stitch_bias.")) for n in names)
    content = json.loads(open(f"{whole.args.output_dir}/checkpoint-3/stitches.json").read())
    assert any("importance" in row for row in content["stitches"])


def test_find_checkpoint_skips_damaged_ones(whole, tmp_path):
    folder = tmp_path / "runs"
    for number in (3, 6):
        shutil.copytree(f"{whole.args.output_dir}/checkpoint-{number}", folder / f"checkpoint-{number}")
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-best")
    assert find_checkpoint("auto", str(folder)) == str(folder / "checkpoint-6")
    weights = folder / "checkpoint-6" / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-9])
    assert find_checkpoint("auto", str(folder)) == str(folder / "checkpoint-3")
    with pytest.raises(ValueError, match="checkpoint-6 holds no whole checkpoint"):
        find_checkpoint(str(folder / "checkpoint-6"), str(folder))
    weights.write_bytes(raw)
    assert find_checkpoint(str(folder / "checkpoint-6"), "elsewhere") == str(folder / "checkpoint-6")
    (folder / "checkpoint-6" / "optimizer.pt").unlink()
    (folder / "checkpoint-3" / "trainer_state.json").unlink()
    assert find_checkpoint("auto", str(folder)) is None
    assert find_checkpoint("auto", str(tmp_path / "none")) is None
    assert find_checkpoint(None, str(folder)) is None


def test_the_best_checkpoint_comes_back_at_the_end(anchors, tmp_path):
    made = run(
        anchors["unequal"], tmp_path, max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, learning_rate=3e-2,
    )  # fmt: skip
    assert made.state.best_model_checkpoint.endswith("checkpoint-2"), "the test needs a best one that is not the last"
    twin = stitched_model(anchors["unequal"])
    twin.load_bundle(Bundle.open(tmp_path / "checkpoint-2"))
    assert_close(trained(made.model), trained(twin), atol=0, rtol=0)


def test_logs_tell_the_teacher_and_each_interval(whole):
    logs = [entry for entry in whole.state.log_history if "loss" in entry]
    assert len(logs) == 6
    assert ["loss_teacher" in entry for entry in logs] == [not stitch.is_anchor for stitch in whole.drawn.values()]
    intervals = {name for entry in logs for name in entry if name.startswith("loss_interval_")}
    assert intervals
    assert intervals <= {f"loss_interval_{i}" for i in range(3)}
    assert all(0 < entry[name] < 50 for entry in logs for name in entry if name.startswith("loss"))
    assert all(sum(name.startswith("loss_interval_") for name in entry) == 1 for entry in logs)


def test_evaluation_in_training_reports_anchors_and_middles(whole):
    metrics = whole.evaluate()
    found = evaluated(whole.model)
    for key in ("0[0:3]", "1[0:5]"):
        number = whole.model.space[key].stitch_id
        assert metrics[f"eval_loss_stitch_{number}"] == pytest.approx(found["loss"][key], rel=1e-4)
        assert metrics[f"eval_exact_match_stitch_{number}"] == found["exact_match"][key]
    rated = [value for name, value in metrics.items() if name.startswith("eval_loss_stitch_")]
    assert metrics["eval_loss"] == pytest.approx(sum(rated) / len(rated))
    assert len(rated) < len(whole.model.keys)


OPTIONS = [
    {"importance": score, "sampling": scheme, "sampling_warmup": 0.0} for score, scheme in zip(SCORES, cycle(SCHEMES))
]
OPTIONS += [
    {"anchor_share": 0.0, "train_teacher": True},
    {"inplace_teacher": False},
    {"distillation": "soft"},
    {"distillation": "none"},
    {"bf16": True},
    {"bf16": True, "anchor_share": 0.0},
    {"optim": "adamw_torch", "weight_decay": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_option_runs(options, anchors, tmp_path):
    made = run(anchors["unequal"], tmp_path, **options)
    assert made.state.global_step == 4
    everything = "train_teacher" in options or "inplace_teacher" in options
    rated = Counter(stitch.key for stitch in made.drawn.values() if everything or not stitch.is_anchor)
    assert made.importance.visits == rated != {}
    weights, start = trained(made.model), trained(stitched_model(anchors["unequal"]))
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in weights.values())
    assert any(not torch.equal(weights[name], start[name]) for name in weights)
    assert len(SCORES) >= len(SCHEMES)  # or the pairs above leave one out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"distillation": "warm"}, "'warm' is unknown"),
        ({"distillation_weight": 2.0}, "distillation_weight is 2.0"),
        ({"sampling": "banana"}, "'banana' is unknown; one of importance"),
        ({"sampling_warmup": 100}, "sampling_warmup is 100; a share"),
        ({"interval_count": 0}, "interval_count is 0"),
        ({"importance": "luck"}, "'luck' is unknown; one of snip"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"global_batch_size": 10, "per_device_train_batch_size": 4}, "global_batch_size 10 is no multiple of 4"),
    ],
)
def test_arguments_that_cannot_work_are_named(options, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        StitchTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)


def test_a_view_runs_its_stitch_after_mixed_precision_too(anchors, tmp_path):
    """Accelerate leaves a `forward` on the model that is bound to it."""
    model = stitched_model(anchors["unequal"])
    trainer(model, tmp_path, bf16=True, max_steps=1).train()
    assert "forward" in vars(model)
    for stitch in model.space:
        assert torch.equal(model.pinned(stitch.key)(IDS).logits, model(IDS, stitch_id=stitch.key).logits)
    assert not torch.equal(model.pinned(0)(IDS).logits, model(IDS).logits)


def test_baselines_of_other_anchors_are_refused(stitched, tmp_path):
    space, path = stitched("unequal").space, tmp_path / "alone.json"
    assert read_baselines(None, space) == {}
    with pytest.raises(ValueError, match=r"there is no file .*alone\.json of baselines"):
        read_baselines(path, space)
    path.write_text(json.dumps({"0[0:3]": {"loss": 1.0}}))
    assert read_baselines(path, space) == {"0[0:3]": {"loss": 1.0}}
    for row in ([], {"loss": "low"}, {"loss": None}):
        path.write_text(json.dumps({"0[0:3]": row}))
        with pytest.raises(ValueError, match=r"alone\.json: the row of 0\[0:3\] is .*, an object of numbers is needed"):
            read_baselines(path, space)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"alone\.json is not JSON"):
        read_baselines(path, space)
    path.write_text(json.dumps({"0[0:7]": {"loss": 1.0}}))
    with pytest.raises(ValueError, match=r"alone\.json has a row of 0\[0:7\], the anchors here are 0\[0:3\], 1\[0:5\]"):
        read_baselines(path, space)


def test_the_plot_shows_baselines_however_they_were_tuned(stitched, tmp_path):
    model, path = stitched("unequal"), tmp_path / "plot.svg"
    table = model.table.with_metrics("loss", {key: float(i) for i, key in enumerate(model.keys)}, decides=True)
    plot_stitches(model.space, table, path, alone={"0[0:3]": {"loss": 1.0}}, title="sizes")
    assert "<!-- anchor tuned alone -->" in path.read_text()


def test_a_model_of_which_nothing_trains_is_refused(stitched, tmp_path):
    with pytest.raises(ValueError, match=r"nothing of this model trains: call model\.attach_pst"):
        trainer(stitched("unequal"), tmp_path)


def test_what_decides_the_held_out_rows_lies_in_each_checkpoint(anchors, tmp_path):
    """Two runs in one folder, the second ending before its first checkpoint: the guard knows whose weights are resumed."""
    settings, options = {"eval_size": 5, "seed": 0}, {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    other = settings | {"seed": 1}
    model = stitched_model(anchors["unequal"])
    first = trainer(model, tmp_path, data_settings=settings, **options)
    first.train()
    checkpoint = find_checkpoint("auto", str(tmp_path))
    second = trainer(model, tmp_path, data_settings=other, **options)
    check_settings(checkpoint, settings)
    check_settings(None, other)
    named = "checkpoint-1 began with other settings: --seed 0 there, 1 here. Resume with the same"
    with pytest.raises(ValueError, match=named):
        check_settings(checkpoint, other)
    with pytest.raises(ValueError, match=named):
        second.train(resume_from_checkpoint=checkpoint)
    second.train()  # over the first one's checkpoint
    check_settings(checkpoint, other)
    with pytest.raises(ValueError, match="--seed 1 there, 0 here"):
        check_settings(checkpoint, settings)


def test_a_checkpoint_saved_over_another_is_none_until_it_is_whole(whole, anchors, tmp_path, monkeypatch):
    shutil.copytree(f"{whole.args.output_dir}/checkpoint-3", tmp_path / "checkpoint-1")
    made = trainer(stitched_model(anchors["unequal"]), tmp_path, max_steps=1, save_strategy="steps", save_steps=1)

    def killed(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(made, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert find_checkpoint("auto", str(tmp_path)) is None


def test_a_checkpoint_is_compared_by_what_its_options_mean(anchors, tmp_path, stitched):
    model = fresh(anchors["unequal"], PSTConfig(rank=4))
    model.save_pretrained(tmp_path)
    bundle = Bundle.open(tmp_path)
    same = fresh(anchors["unequal"], PSTConfig(rank=[4, 4]))
    check_checkpoint(bundle, "there", same, bundle.table["importance_score"])
    with pytest.raises(ValueError, match="PST settings .*'rank': 4.*'rank': 2"):
        check_checkpoint(bundle, "there", fresh(anchors["unequal"], PSTConfig(rank=2)), None)
    with pytest.raises(
        ValueError, match="there is of another space: kernel_size 1 there, 2 here; resume with the options"
    ):
        check_checkpoint(bundle, "there", fresh(anchors["unequal"], PSTConfig(rank=4), kernel_size=2), None)
    small, large = anchors["unequal"]
    other = LlamaForCausalLM.from_pretrained(small)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.neg_()
    other.save_pretrained(tmp_path / "other")  # of the same shape
    with pytest.raises(
        ValueError, match=r"began on anchor 0 of .*, this run has that of .*other: model.layers.1 had the digest"
    ):
        check_checkpoint(bundle, "there", fresh([tmp_path / "other", large], PSTConfig(rank=4)), None)


def test_every_run_has_its_own_warm_up_of_draws(anchors, tmp_path, monkeypatch):
    """A second run, or one that starts anew with smaller batches, may have another number of steps."""
    made = trainer(stitched_model(anchors["unequal"]), tmp_path, max_steps=2, sampling_warmup=0.5)
    warm_ups, draw = [], StitchSampler.draw
    monkeypatch.setattr(
        StitchSampler, "draw", lambda self, *given: warm_ups.append(self.warmup_steps) or draw(self, *given)
    )
    made.train()
    assert made._sampler.warmup_steps == 1
    made.args.max_steps, made.drawn = 6, {}
    made.draw = type(made).draw.__get__(made)
    made.train()
    assert warm_ups == [1] * 2 + [3] * 6


UNUSED = [
    ({}, {"compute_loss_func": print}, "compute_loss_func is given"),
    ({}, {"compute_metrics": print}, "compute_metrics is given"),
    ({}, {"preprocess_logits_for_metrics": print}, "preprocess_logits_for_metrics is given"),
    ({"neftune_noise_alpha": 5.0}, {}, "neftune_noise_alpha 5.0 is not supported"),
    ({"push_to_hub": True}, {}, r"push_to_hub is not supported.*model\.push_to_hub"),
]


@pytest.mark.parametrize(("options", "given", "named"), UNUSED)
def test_what_a_trainer_would_not_honour_is_refused(options, given, named, anchors, tmp_path):
    arguments = StitchTrainingArguments(**{**DEFAULTS, "output_dir": str(tmp_path), **options})
    with pytest.raises(ValueError, match=named):
        StitchTrainer(stitched_model(anchors["unequal"]), arguments, data_collator=Collator(0), **given)


def test_several_sets_to_evaluate_on_are_told_apart(anchors, tmp_path):
    made = trainer(stitched_model(anchors["unequal"]), tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    one = made.evaluate()
    made.eval_dataset = {"own": dataset(ROWS[:5]), "more": dataset(ROWS[5:8])}
    both = made.evaluate()
    assert {name.replace("eval_own_", "eval_"): v for name, v in both.items() if "own" in name} == one
    assert len(both) == 2 * len(one)
    assert made.evaluate({"own": dataset(ROWS[:5])}) == {n: v for n, v in both.items() if "own" in n}
    assert made.evaluate("more")["eval_loss"] == both["eval_more_loss"]
    made.train()
    assert {"eval_own_loss", "eval_more_loss"} <= {name for entry in made.state.log_history for name in entry}
    made.eval_dataset = None
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        made.evaluate()


def test_settings_the_trainer_cannot_use_are_named(anchors, tmp_path, stitched):
    model = stitched_model(anchors["unequal"])
    model.save_pretrained(tmp_path / "bundle")
    with pytest.raises(ValueError, match="the largest anchor is the teacher and was not loaded"):
        trainer(type(model).from_pretrained(tmp_path / "bundle", stitch_id=0), tmp_path)


def test_defaults_are_the_papers(tmp_path):
    arguments = StitchTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert arguments.gradient_accumulation_steps * arguments.per_device_train_batch_size == 128
    assert (arguments.num_train_epochs, arguments.eta, arguments.interval_count) == (10, 0.9, 6)
    assert (arguments.distillation, arguments.distillation_weight) == ("hard", 0.5)
    assert len(dataset()) == 32
    pictures = ImageTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert pictures.gradient_accumulation_steps * pictures.per_device_train_batch_size == 64
    assert (pictures.num_train_epochs, pictures.base_lr, pictures.learning_rate) == (100, 1e-3, 1e-3 * 64 / 256)
    assert (pictures.warmup_steps, pictures.lr_scheduler_type, pictures.interval_count) == (0.1, "cosine", 15)


def test_ways_to_spread_a_run_that_are_not_supported_are_refused(anchors):
    model = stitched_model(anchors["unequal"])
    one = {
        "n_gpu": 1,
        "world_size": 1,
        "average_tokens_across_devices": True,
        "train_teacher": False,
        "label_smoothing_factor": 0,
        "neftune_noise_alpha": None,
        "push_to_hub": False,
        "enable_jit_checkpoint": False,
        **dict.fromkeys(["fsdp", "fsdp_config", "deepspeed", "parallelism_config"]),
    }
    for args, flags, named in (
        ({"n_gpu": 2}, {}, "2 GPUs in one process: start with `accelerate launch`"),
        ({}, {"is_fsdp_enabled": True}, "FSDP, DeepSpeed and other ways .* are not supported"),
        ({}, {"is_deepspeed_enabled": True}, "FSDP, DeepSpeed and other ways .* are not supported"),
        ({"parallelism_config": object()}, {}, "parallelism_config is asked for: FSDP, DeepSpeed"),
        ({"enable_jit_checkpoint": True}, {}, "enable_jit_checkpoint is not needed, SIGTERM"),
        ({"world_size": 2, "average_tokens_across_devices": False}, {}, "average_tokens_across_devices is off"),
    ):
        how = dict.fromkeys(["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"])
        how |= {"is_fsdp_enabled": False, "is_deepspeed_enabled": False} | flags
        with pytest.raises(ValueError, match=named):
            check_run(SimpleNamespace(args=SimpleNamespace(**one | args), model=model, **how), None)


def test_fsdp_is_refused_where_accelerate_would_leave_it_out(anchors, tmp_path, monkeypatch):
    """On a CPU it makes plain DDP of it without a word."""
    for options in ({"fsdp": "full_shard"}, {"fsdp": True}, {"fsdp_config": {"version": 2}}):
        arguments = StitchTrainingArguments(**{**DEFAULTS, "output_dir": str(tmp_path), **options})
        with pytest.raises(ValueError, match="fsdp.* is asked for: FSDP, DeepSpeed and other ways .* use plain DDP"):
            check_arguments(arguments)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP by `accelerate launch` is asked for"):
        trainer(stitched_model(anchors["unequal"]), tmp_path)
    for recipe in ("finetune", "finetune-vision", "baseline", "baseline-vision"):
        words = [
            "--anchors",
            "a",
            "b",
            "--data",
            "d",
            "--use_cpu",
            "--output_dir",
            str(tmp_path),
            "--report_to",
            "none",
        ]
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            assert main([recipe, *words]) == 2
        assert told.getvalue().startswith("stitched-llama: FSDP by `accelerate launch` is asked for"), recipe


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_anchors_train_after_an_evaluation_or_are_refused(bits, tmp_path):
    """bitsandbytes packs 4-bit weights for a CPU with AVX512-BF16 in evaluation; no gradient passes through those."""
    settings = BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else BitsAndBytesConfig(load_in_4bit=True)
    folders = [str(tmp_path / name) for name in ("small", "large")]
    for number, folder in enumerate(folders):
        spread(pico_anchor(64 * (number + 1), 2 + number, 4, 2, vocab_size=260)).save_pretrained(folder)
    weights = []
    for evaluate in (False, True):
        model = stitched_model(folders, quantization_config=settings)
        if evaluate:
            evaluated(model)
        try:
            made = trainer(model, tmp_path, max_steps=1)
            made.train()
        except ValueError as error:
            assert bits == 4, error  # noqa: PT017
            assert "4 bit" in str(error)  # noqa: PT017
            return
        weights.append(trained(model))
    assert_close(*weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_ranks_equal_one_process_on_the_same_global_batch(checkpointing, anchors, tmp_path):
    options = {"per_device_train_batch_size": 4, "activation_checkpointing": checkpointing}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "tests" / "tiny_runs.py"]
    python(*command, tmp_path, json.dumps(anchors["unequal"]), json.dumps(options), ACCELERATE_USE_CPU="1")
    ranks = [torch.load(tmp_path / f"rank{number}.pt") for number in (0, 1)]
    assert [rank["world"] for rank in ranks] == [2, 2], "torchrun started one process"
    one = run(anchors["unequal"], tmp_path / "one", **options)
    for rank in ranks:
        assert rank["visits"] == one.importance.visits
        assert rank["averages"] == pytest.approx(one.importance.averages, rel=1e-3)
        assert_close(rank["weights"], trained(one.model), atol=2e-4, rtol=1e-3)
        for name, values in evaluated(one.model).items():
            assert rank["found"][name] == pytest.approx(values, abs=1e-3), name
    assert_close(ranks[0]["weights"], ranks[1]["weights"], atol=0, rtol=0)
    assert ranks[0]["found"] == ranks[1]["found"]
    assert ranks[0]["averages"] == ranks[1]["averages"]
    for rank in ranks if not checkpointing else []:
        (ended, refused), checkpoint, weights = rank["stops"]
        assert ended == "143"
        assert checkpoint == str(tmp_path / "stops" / "checkpoint-2")
        assert re.match(
            r"step 3: the loss of stitch \d .* is nan on rows .* of the training set \(batch 0 of the step on rank 1\)",
            refused,
        )
        assert_close(weights, rank["weights"], atol=0, rtol=0)


def test_one_route_trains_a_step_and_every_anchor_has_its_share(anchors, tmp_path, monkeypatch):
    """Two steps of three are an anchor's; whatever trains is one route, and the teacher stays as it is beside it."""
    made = trainer(stitched_model(anchors["three"], pairs="chain"), tmp_path, max_steps=12, anchor_share=0.67)
    moved = []
    complete = type(made)._complete_step

    def watched(self, student):
        routes = {
            role: {n for n, p in self.model.named_parameters() if p in kept} for role, kept in self._gradients.items()
        }
        moved.append((student, routes))
        return complete(self, student)

    monkeypatch.setattr(type(made), "_complete_step", watched)
    made.train()
    for student, routes in moved:
        assert not routes["teacher"]
        assert {name.split(".")[1] for name in routes["student"] if name.startswith("anchors.")} == {
            str(segment.anchor) for segment in student.segments
        }
    assert [student for student, _ in moved] == list(made.drawn.values())
    counts = Counter(made.draw(step).key for step in range(900))
    for stitch in made.model.space:
        if stitch.is_anchor:
            assert 160 < counts[stitch.key] < 260


@pytest.mark.parametrize("size", [8, 2])
def test_excess_loss_is_above_the_teachers_on_the_whole_step(size, anchors, tmp_path):
    """Read off by hand on a twin before the step, whatever the split into batches; and the operations of the two that ran."""
    made = trainer(
        stitched_model(anchors["unequal"]), tmp_path, max_steps=1, sampling="uniform", seed=9,
        per_device_train_batch_size=size, global_batch_size=8, anchor_share=0.0,
    )  # fmt: skip
    student, large = made.draw(0), made.largest
    assert not student.is_anchor
    data = list(made.get_train_dataloader())[: 8 // size]
    made.train()
    twin = stitched_model(anchors["unequal"]).train()
    totals, tokens = {student.key: 0.0, large.key: 0.0}, 0
    for batch in data:
        count = int((batch["labels"][:, 1:] != -100).sum())
        tokens += count
        for key in totals:
            totals[key] += float(twin(**batch, stitch_id=key, use_cache=False).loss.detach()) * count
    wanted = (totals[large.key] - totals[student.key]) / tokens
    assert made.importance.averages == {student.key: pytest.approx(wanted, rel=1e-3, abs=1e-5)}
    macs = 3 * student.macs + large.macs  # forward and backward of the one, forward of the other
    assert made.state.total_flos == sum(2 * batch["input_ids"].numel() * macs for batch in data)


def test_anchors_learn_from_labels_alone_and_leave_importance_alone(anchors, tmp_path, monkeypatch):
    made = trainer(stitched_model(anchors["unequal"]), tmp_path, max_steps=4, anchor_share=1.0, logging_steps=1)
    taught = []
    monkeypatch.setattr(
        trainer_module, "distillation_loss", lambda k, w, logits, teacher, loss, n: taught.append(teacher) or loss
    )
    made.train()
    assert taught == [None] * 4
    assert not made.importance.averages
    assert not any("loss_teacher" in entry for entry in made.state.log_history)
    each = trainer(stitched_model(anchors["unequal"]), tmp_path, max_steps=4, anchor_share=1.0, train_teacher=True)
    each.train()
    assert each.importance.visits == {each.model.space.anchor_stitch(0).key: 4}


def test_averages_without_a_count_weigh_as_a_long_history():
    importance = Importance("loss", 0.9, {"old": -1.0})
    importance.update("old", StepSignals(0, 0, 5.0))
    importance.update("new", StepSignals(0, 0, 5.0))
    assert importance.averages == pytest.approx({"old": -1.4, "new": -5.0})
