"""A run stops where it would lie: at what is not finite, at data that cannot be trained on; and when it is told to."""

import contextlib
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, fresh, randomise
from image_anchors import vit
from tiny_runs import DEFAULTS, ROWS, Pictures, dataset, image_trainer, stitched_model, trained, trainer
from transformers import LlamaForCausalLM, Trainer

from stitched_llama import PSTConfig, StitchedViTForImageClassification, StitchTrainer, StitchTrainingArguments
from stitched_llama.training import (
    Collator,
    FiniteGradients,
    collate_images,
    evaluate_plain,
    evaluate_stitches,
    find_checkpoint,
    image_scores,
    spearman,
)
from stitched_llama.training.finite import check_step
from stitched_llama.training.interruption import Interruption


def image_model(**how):
    torch.manual_seed(0)
    model = StitchedViTForImageClassification.from_anchors([vit(16, 3), vit(24, 3)], **how)
    model.attach_pst(PSTConfig(rank=2))
    return model


# ---- what is not finite


@pytest.mark.parametrize(
    "options", [{}, {"per_device_train_batch_size": 2}, {"train_teacher": True, "anchor_share": 0.0}]
)
def test_a_row_that_is_not_finite_ends_the_run_and_is_named(options, tmp_path):
    """One pixel of picture 11; the epoch has two steps of eight."""
    run = image_trainer(image_model(), tmp_path, max_steps=6, **options)
    run.train_dataset.pixels[11, 0, 3, 3] = torch.nan
    with pytest.raises(
        ValueError, match=r"^step [12]: the loss of stitch \d+ \(.*\) is nan on rows 11 of the training set \(batch"
    ):
        run.train()
    assert all(tensor.isfinite().all() for tensor in trained(run.model).values())


@pytest.mark.parametrize("options", [{"save_strategy": "steps", "save_steps": 1}, {"per_device_train_batch_size": 2}])
def test_weights_that_are_not_finite_end_the_run_and_the_last_checkpoint_stands(options, anchors, tmp_path):
    made = trainer(stitched_model(anchors["unequal"]), tmp_path, max_steps=4, **options)
    optimizer_step = made._complete_step

    def spoils(student):
        optimizer_step(student)
        if made.state.global_step == 2:  # the third step's gradient is fine, what comes of it is not
            made.optimizer.param_groups[0]["lr"] = float("inf")

    made._complete_step = spoils
    saves = "save_steps" in options
    named = (
        "lora.* is not finite after step 3"
        if saves
        else r"step 4: the loss of stitch .* is nan on rows \d+, .* of the training set"
    )
    with pytest.raises(ValueError, match=named):
        made.train()
    found = find_checkpoint("auto", str(tmp_path))
    assert found == (str(tmp_path / "checkpoint-2") if saves else None)


def test_a_gradient_that_is_not_finite_ends_the_run(anchors, tmp_path):
    """Loss and weights are numbers; rows are named by their places in the training set, as the loader drew them."""
    made = trainer(stitched_model(anchors["unequal"]), tmp_path, per_device_train_batch_size=4)
    drawn, collator = [], made.data_collator
    made.data_collator = lambda rows: drawn.append(list(rows)) or collator(rows)
    for parameter in made.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda g: g / 0 if made.state.global_step == 3 else g)
    with pytest.raises(ValueError, match=r"step 4: the gradient of stitch \d .* is not finite on rows") as error:
        made.train()
    rows = [part.split(" of the training set")[0] for part in str(error.value).split("rows ")[1:3]]
    rows = [[made.train_dataset[int(number)] for number in part.split(", ")] for part in rows]
    assert rows == drawn[7:9]  # of the fourth step; the first batch of all is looked at before the run


def test_the_last_steps_weights_are_looked_at_too(anchors, tmp_path):
    made = trainer(stitched_model(anchors["unequal"]), tmp_path, max_steps=1)
    made.create_optimizer()
    made.optimizer.param_groups[0]["lr"] = made.args.learning_rate = float("inf")
    with pytest.raises(ValueError, match="is not finite after step 1: nothing is saved of it"):
        made.train()


def test_an_evaluation_that_is_not_finite_is_no_evaluation(anchors):
    model = fresh(anchors["unequal"])
    batch = Collator(0)(dataset(ROWS[:4]).examples)
    with torch.no_grad():
        model.anchors[0].model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"stitch 0\[0:3\] has the loss nan on row 0 of those it is evaluated on"):
        evaluate_stitches(model, [batch], progress=False)
    with pytest.raises(ValueError, match="the model has the loss nan on row 0"):
        evaluate_plain(model.anchors[0], [batch])


def test_an_alignment_that_is_not_finite_stops(anchors):
    model = fresh(anchors["unequal"])
    batch = Collator(0)(dataset(ROWS[:4]).examples)
    with torch.no_grad():
        model.anchors[1].lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"step 1 of the alignment: the loss of stitch \d \(.*\) is nan"):
        model.calibrate([batch] * 8, align_steps=3, progress=False)


@pytest.mark.parametrize("which", ["loss", "gradient"])
def test_a_plain_trainer_of_the_baselines_stops_too(which, anchors, tmp_path):
    model = LlamaForCausalLM.from_pretrained(anchors["unequal"][0])
    arguments = StitchTrainingArguments(**{**DEFAULTS, "output_dir": str(tmp_path), "per_device_train_batch_size": 4})
    run = Trainer(model, arguments, Collator(0), dataset(), callbacks=[FiniteGradients()])
    model.lm_head.weight.register_hook(
        lambda g: g * (torch.nan if which == "gradient" and run.state.global_step == 2 else 1)
    )
    if which == "loss":
        with torch.no_grad():
            model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(
        ValueError, match=r"^step [13]: the gradient is not finite on rows \d+, .* \(batch 0 .*; rows .* \(batch 1"
    ):
        run.train()
    for name in ("lora_baseline", "vision_baseline"):
        assert "FiniteGradients()" in (ROOT / "recipes" / f"{name}.py").read_text()


def test_gradients_that_overflow_under_float16_are_the_scalers():
    for scale, refused in ((2.0**16, False), (0.5, True)):
        run = SimpleNamespace(
            accelerator=SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda s=scale: s), num_processes=1)
        )
        run.faults, run.batches_of_step, run.describe_batch, run.state = [], 1, str, SimpleNamespace(global_step=4)
        stitch, gradients = SimpleNamespace(stitch_id=1, key="k"), [torch.tensor([1.0, torch.inf])]
        with (
            pytest.raises(ValueError, match="step 5: the gradient of stitch 1") if refused else contextlib.nullcontext()
        ):
            check_step(run, stitch, [1.0, 0.0], gradients)
        with pytest.raises(ValueError, match="step 5"):
            check_step(run, stitch, [float("nan"), 0.0], gradients)


def test_spearman_of_what_is_no_number_ends():
    nan = float("nan")
    assert spearman([1, 2, 3], [nan, nan, nan]) != spearman([1, 2, 3], [3, nan, 1])  # both NaN, and neither for ever


# ---- data that cannot be trained on


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from dataset().examples


def made_with(model, output, train, collator=None, evaluate=None, **options):
    arguments = StitchTrainingArguments(**{**DEFAULTS, "output_dir": str(output), **options})
    return StitchTrainer(model, arguments, collator or Collator(0), train_dataset=train, eval_dataset=evaluate)


def test_a_stream_is_trained_on_and_not_evaluated_on(anchors, tmp_path):
    model = stitched_model(anchors["unequal"])
    for streams in (Stream(), {"own": Stream()}):
        with pytest.raises(
            ValueError, match="(own|eval_dataset) is a Stream, a stream: every stitch is evaluated on all of it"
        ):
            made_with(model, tmp_path, dataset(), evaluate=streams, eval_strategy="steps", eval_steps=2)
    run = made_with(model, tmp_path, Stream(), max_steps=2)
    with pytest.raises(ValueError, match="a stream"):
        run.evaluate(Stream())
    run.train()
    assert run.state.global_step == 2


def test_labels_that_are_all_masked_are_refused(anchors, tmp_path):
    model = stitched_model(anchors["unequal"])
    masked = [{**row, "labels": [-100] * len(row["labels"])} for row in dataset().examples]
    with pytest.raises(ValueError, match="no label of the 32 training rows is one to learn, all are -100"):
        made_with(model, tmp_path, masked).train()
    masked[3] = dataset().examples[3]
    with pytest.raises(ValueError, match=r"step \d has no label to learn.* rows \d+, .* of the training set"):
        made_with(model, tmp_path, masked).train()


def test_a_column_that_is_no_tensor_is_refused_by_name(anchors, tmp_path):
    model = stitched_model(anchors["unequal"])

    def with_text(rows):
        return Collator(0)(rows) | {"text": ["a"] * len(rows)}

    with pytest.raises(ValueError, match="a batch has the column 'text', a list: leave it out"):
        made_with(model, tmp_path, dataset(), with_text).train()
    with pytest.raises(ValueError, match="a batch has the column 'text', a list"):
        made_with(model, tmp_path, Stream(), with_text, max_steps=2).train()
    with pytest.raises(ValueError, match="a batch has the column 'text', a list"):
        evaluate_stitches(model, [with_text(dataset().examples[:2])], progress=False)

    def unlabelled(rows):
        return {name: tensor for name, tensor in Collator(0)(rows).items() if name != "labels"}

    with pytest.raises(ValueError, match="no labels: a batch holds input_ids, attention_mask only"):
        made_with(model, tmp_path, dataset(), unlabelled).train()


@pytest.mark.parametrize("kind", ["mixup", "multi-label", "columns"])
def test_targets_that_are_not_one_class_are_refused(kind, tmp_path):
    """A cross-entropy of them would be a fifth of the loss that `forward` has, of five classes."""
    labels = torch.nn.functional.one_hot(torch.arange(16) % 7, 7)
    labels = {"mixup": labels * 0.7 + labels.roll(1, 0) * 0.3, "multi-label": labels + 0.0, "columns": labels}[kind]
    run = image_trainer(image_model(), tmp_path)
    run.data_collator = lambda rows: collate_images(rows) | {"labels": labels[: len(rows)]}
    with pytest.raises(
        ValueError, match=r"labels are (float32|int64) \[8, 7\]: integers \[8\], one class an image, .* mixup"
    ):
        run.train()
    with pytest.raises(ValueError, match="one class an image"):
        evaluate_stitches(run.model, [run.data_collator([Pictures(16)[i] for i in range(8)])], progress=False)


def test_targets_of_text_are_one_class_a_token(anchors, tmp_path):
    def soft(rows):
        batch = Collator(0)(rows)
        return batch | {"labels": batch["labels"].float()}

    with pytest.raises(ValueError, match=r"labels are float32 .*, one class a token"):
        made_with(stitched_model(anchors["unequal"]), tmp_path, dataset(), soft).train()


def test_a_problem_type_of_another_loss_is_refused(tmp_path):
    model = image_model()
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="problem_type is 'multi_label_classification': only one class an image"):
        image_trainer(model, tmp_path)
    model.config.problem_type, model.config.num_labels = None, 1
    with pytest.raises(ValueError, match="problem_type is 'regression'"):
        image_trainer(model, tmp_path)
    assert image_scores(torch.zeros(2, 7), torch.tensor([0, 1]))[0].shape == (2,)


# ---- SIGTERM


def test_sigterm_saves_a_checkpoint_and_leaves_within_a_step(anchors, tmp_path):
    made = trainer(stitched_model(anchors["unequal"]), tmp_path, max_steps=6)
    before, step = signal.getsignal(signal.SIGTERM), made.training_step

    def killed(*given):
        if made.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*given)

    made.training_step = killed
    with pytest.raises(SystemExit) as ended:
        made.train()
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert find_checkpoint("auto", str(tmp_path)) == str(tmp_path / "checkpoint-3")
    again = trainer(randomise(stitched_model(anchors["unequal"]), 5), tmp_path, max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    whole = trainer(stitched_model(anchors["unequal"]), tmp_path / "whole", max_steps=6)
    whole.train()
    assert all(torch.equal(tensor, trained(whole.model)[name]) for name, tensor in trained(again.model).items())


def test_a_worker_process_dies_of_sigterm_as_ever():
    stop = Interruption()
    with stop.awaited():
        told, tells = os.pipe()
        child = os.fork()
        if not child:
            os.write(tells, b"1")
            time.sleep(30)
            os._exit(0)
        os.read(told, 1)  # what comes before it runs is lost on a fork
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
    assert not stop.received
