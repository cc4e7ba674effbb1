"""SN-Net's own procedure by settings: no in-place teacher, another teacher, the anchors' own rate, all weights trained."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, python, randomise
from image_anchors import CLASSES, build, swin, vit
from tiny_runs import Pictures, fresh, image_model, image_trainer, stitched_model, trainer
from transformers import TrainerCallback

from stitched_llama import (
    PSTConfig,
    StitchedSwinForImageClassification,
    StitchSampler,
    StitchTable,
    StitchTrainingArguments,
)
from stitched_llama.training import collate_images, evaluate_stitches, pico_anchor
from stitched_llama.training import trainer as trainer_module
from stitched_llama.training.distillation import frozen_eval

pytestmark = pytest.mark.filterwarnings("ignore:.*junctions do not fit:UserWarning")


class Keep(TrainerCallback):
    """Keeps the gradients that reach the optimiser."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def whole(**how):
    torch.manual_seed(0)
    model = StitchedSwinForImageClassification.from_anchors(build("swin"), kernel_size=2, **how)
    model.attach_pst(PSTConfig(full=True))
    return model


@pytest.mark.parametrize("kind", ["labels", "teacher"])
def test_a_step_without_in_place_teacher_is_the_students_alone(kind, tmp_path):
    teacher = swin(8, [2, 2]) if kind == "teacher" else None
    model, twin, keep = whole(), whole().train(), Keep()
    run = image_trainer(
        model, tmp_path, teacher, max_steps=1, max_grad_norm=0, inplace_teacher=False, anchor_share=0.0,
        sampling="uniform", distillation="hard", distillation_weight=0.3, per_device_train_batch_size=16, global_batch_size=16,
    )  # fmt: skip
    run.add_callback(keep)
    student = run.draw(0)
    assert not student.is_anchor
    run.train()
    data = Pictures(model.config.image_size)
    batch = collate_images([data[i] for i in range(16)])
    pixels, labels = batch["pixel_values"], batch["labels"]
    logits = twin(pixels, stitch_id=student.key).logits
    loss = F.cross_entropy(logits, labels)
    if kind == "teacher":
        with torch.no_grad():
            taught = teacher(pixels).logits.argmax(-1)
        loss = 0.7 * loss + 0.3 * F.cross_entropy(logits, taught)
    loss.backward()
    own = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    assert set(own) == set(keep.gradients)
    for name, gradient in keep.gradients.items():
        torch.testing.assert_close(gradient, own[name], atol=1e-5, rtol=1e-3)
    assert "loss_teacher" not in {name for entry in run.state.log_history for name in entry}


def test_a_teacher_that_does_not_fit_is_refused_before_the_run(tmp_path, anchors):
    turned = {i: f"class {CLASSES - 1 - i}" for i in range(CLASSES)}
    for other, options, named in (
        (vit(16, 3, id2label={0: "a", 1: "b"}), {}, f"the teacher has 2 classes, the stitched model {CLASSES}"),
        (vit(16, 3, id2label=turned), {}, "class 0 is 'class 0' here and 'class 6' for the teacher"),
        (vit(16, 3, size=32), {}, "the teacher takes images of 32, the stitched model of 16"),
        (vit(16, 3), {"distillation": "none"}, "it would have no effect"),
        (vit(16, 3), {"distillation_weight": 0.0}, "it would have no effect"),
        (None, {"label_smoothing_factor": 0.1}, "label_smoothing_factor 0.1 is not supported"),
    ):
        with pytest.raises(ValueError, match=named):
            image_trainer(whole(), tmp_path, other, **options)
    image_trainer(whole(), tmp_path, vit(16, 3).to(torch.bfloat16), max_steps=1).train()
    text = stitched_model(anchors["unequal"])
    run = trainer(text, tmp_path)
    with pytest.raises(ValueError, match="the teacher has 99 classes"):
        type(run)(model=text, args=run.args, teacher=pico_anchor(16, 2, 2, 2, 99))


def test_anchors_take_their_share_of_the_rate(tmp_path):
    model = whole()
    run = image_trainer(model, tmp_path, anchor_lr_scale=0.1, learning_rate=0.5)
    rates = {p: group["lr"] for group in run.create_optimizer().param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        slow = name.startswith("anchors.") and "classifier" not in name
        assert rates[parameter] == pytest.approx(0.05 if slow else 0.5), name
    with pytest.raises(ValueError, match="anchor_lr_scale 0.1 is for anchors that train whole"):
        image_trainer(image_model({}), tmp_path, anchor_lr_scale=0.1)
    with pytest.raises(ValueError, match="a factor above 0"):
        image_trainer(whole(), tmp_path, anchor_lr_scale=-3.0)


def test_full_training_lowers_the_loss_of_every_stitch_and_moves_the_anchors(tmp_path):
    how = {"adapter": "bottleneck", "rescale": "bilinear", "across_stages": True, "adapter_norm": "batch"}
    model = StitchedSwinForImageClassification.from_anchors(build("swin"), **how)
    model.calibrate([{"pixel_values": Pictures(16).pixels}], progress=False)
    model.attach_pst(PSTConfig(full=True))
    before = {name: tensor.clone() for name, tensor in model.anchors.named_parameters()}
    run = image_trainer(
        model, tmp_path, inplace_teacher=False, anchor_share=0.0, sampling="uniform", max_steps=120, learning_rate=3e-3
    )
    data = [collate_images([run.train_dataset[i] for i in range(16)])]
    first = evaluate_stitches(model, data, progress=False)["loss"]
    run.train()
    last = evaluate_stitches(model, data, progress=False)["loss"]
    assert all(last[key] < first[key] for key in first), (first, last)
    assert not any(torch.equal(before[name], tensor) for name, tensor in model.anchors.named_parameters())


def test_resume_of_whole_training_continues_bit_for_bit(tmp_path):
    how = {"adapter": "conv3x3_relu", "rescale": "strided", "across_stages": True, "adapter_norm": "batch"}
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    one = whole(**how)
    image_trainer(one, tmp_path, **options).train()
    again = whole(**how)
    image_trainer(again, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, wanted), found in zip(one.state_dict().items(), again.state_dict().values()):
        if "num_batches" not in name:
            assert torch.equal(wanted, found), name


def test_two_ranks_stitch_pictures_as_one_process(tmp_path):
    """Norms of an adapter see one rank's pictures at a time, so they agree among ranks, not with one process."""
    across = {"across_stages": True, "rescale": "bilinear", "adapter": "bottleneck"}
    options = {"per_device_train_batch_size": 4, "sampling": "uniform"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "tests" / "tiny_runs.py"]
    for norm in ("none", "batch"):
        how = {**across, "adapter_norm": norm}
        python(*command, tmp_path, json.dumps(how), json.dumps(options), ACCELERATE_USE_CPU="1")
        ranks = [torch.load(tmp_path / f"rank{number}.pt") for number in (0, 1)]
        assert [rank["world"] for rank in ranks] == [2, 2]
        assert ranks[0]["found"] == ranks[1]["found"]
        for part in ("weights", "statistics"):
            for name, tensor in ranks[0][part].items():
                assert torch.equal(tensor, ranks[1][part][name]), name
        assert bool(ranks[0]["statistics"]) == (norm == "batch")
        model = randomise(image_model(how))
        run = image_trainer(model, tmp_path / "one", **options)
        run.train()
        data = [collate_images([run.train_dataset[i] for i in range(16)])]
        own = evaluate_stitches(model, data, progress=False)
        if norm == "none":
            assert ranks[0]["found"]["loss"] == pytest.approx(own["loss"], rel=1e-2)
        for name, tensor in ranks[0][
            "statistics"
        ].items():  # a mean over ranks, not a sum: the same size as one process'
            assert (
                0.5 < float((tensor.norm() + 1) / (dict(model.stitching_layers.named_buffers())[name].norm() + 1)) < 2
            )


def test_resuming_with_other_options_is_refused(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    image_trainer(image_model({"adapter": "linear"}), tmp_path, **options).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    for model, named in (
        (
            image_model({"adapter": "linear_relu"}),
            "is of another space: adapter 'linear' there, 'linear_relu' here; resume with the options it began with",
        ),
        (whole(), "is of another space: kernel_size 1 there, 2 here; resume"),
    ):
        with pytest.raises(ValueError, match=named):
            image_trainer(model, tmp_path, **options).train(resume_from_checkpoint=checkpoint)
    other = StitchedSwinForImageClassification.from_anchors(build("swin"))
    other.attach_pst(PSTConfig(rank=4))
    with pytest.raises(ValueError, match="has the PST settings .*'rank': 2.*'rank': 4"):
        image_trainer(other, tmp_path, **options).train(resume_from_checkpoint=checkpoint)


def test_an_outer_teacher_teaches_in_the_largest_anchors_stead(tmp_path, monkeypatch):
    """Anchors too where nobody teaches in place, as SN-Net has it; otherwise they learn as they would alone."""
    for options, anchors_too in (({}, False), ({"inplace_teacher": False}, True)):
        model, teacher, taught = whole(), swin(8, [2, 2]), []
        run = image_trainer(model, tmp_path, teacher, max_steps=4, distillation="hard", **options)
        monkeypatch.setattr(
            trainer_module,
            "distillation_loss",
            lambda k, w, x, word, loss, n, taught=taught: taught.append(word) or loss,
        )
        run.train()
        drawn = [run.draw(step) for step in range(4)]
        assert {stitch.is_anchor for stitch in drawn} == {True, False}
        assert [word is not None for word in taught] == [anchors_too or not stitch.is_anchor for stitch in drawn]


def test_importance_is_rated_against_an_outer_teacher(tmp_path, monkeypatch):
    model, teacher = whole(), swin(8, [2, 2])
    rows = len(Pictures(8))  # each step sees all of them, so that the teacher's loss is one number
    whole_set = {"per_device_train_batch_size": rows, "global_batch_size": rows}
    run = image_trainer(model, tmp_path, teacher, max_steps=2, inplace_teacher=False, **whole_set)
    seen, update = [], type(run.importance).update
    monkeypatch.setattr(
        type(run.importance), "update", lambda s, key, signals: seen.append(signals) or update(s, key, signals)
    )
    run.train()
    batch = next(iter(run.get_train_dataloader()))
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(teacher(batch["pixel_values"]).logits, batch["labels"])
    losses = [signals.teacher_loss for signals in seen]
    assert losses == pytest.approx([float(wanted)] * len(losses), rel=1e-5)
    assert len(losses) == 2
    assert run.importance_score == "excess_loss, outer teacher"
    run.save_importance()
    assert model.table.importance_score == run.importance_score


def test_an_anchor_of_which_nothing_trains_gets_no_step_of_its_own(anchors, tmp_path):
    model = fresh(anchors["unequal"], PSTConfig(rank=0, stitch_bias=False))
    drawn = [trainer(model, tmp_path, anchor_share=1.0, sampling="uniform").draw(step) for step in range(30)]
    assert not all(stitch.is_anchor for stitch in drawn)
    model = fresh(anchors["unequal"], PSTConfig(rank=0))
    assert all(trainer(model, tmp_path, anchor_share=1.0).draw(step).is_anchor for step in range(30))


def test_a_teacher_speaks_without_dropout_and_is_left_as_it_was():
    teacher = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(64).eval())
    modes = [module.training for module in teacher.modules()]
    with frozen_eval(teacher):
        one, two = (teacher(torch.ones(3, 4)) for _ in range(2))
    assert torch.equal(one, two)
    assert not one.requires_grad
    assert [module.training for module in teacher.modules()] == modes


def test_averages_of_other_teaching_do_not_mix(tmp_path):
    model = image_model({})
    small, *others = model.keys[:3]
    model.table = StitchTable(
        importance={small: 1.0, others[0]: 2.0}, visits={small: 3, others[0]: 4}, importance_score="excess_loss"
    )
    assert image_trainer(model, tmp_path).importance.averages == {others[0]: 2.0}  # anchors are not rated
    assert image_trainer(model, tmp_path).importance.visits == {others[0]: 4}
    assert image_trainer(model, tmp_path, inplace_teacher=False).importance.averages == {}
    assert image_trainer(model, tmp_path, train_teacher=True).importance.averages == {small: 1.0, others[0]: 2.0}


def test_the_share_of_anchors_follows_the_way_of_training(tmp_path):
    for options, share in (
        ({}, 0.67), ({"train_teacher": True}, 0), ({"sampling": "esta"}, 0), ({"sampling": "uniform"}, 0),
        ({"sampling": "uniform", "anchor_share": 0.4}, 0.4), ({"inplace_teacher": False}, 0.67), ({"anchor_share": 0.0}, 0),
    ):  # fmt: skip
        assert StitchTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options).share_of_anchors == share
    for name in ("anchor_share", "floor"):
        with pytest.raises(ValueError, match=f"{name} is 1.5; a share lies in 0..1"):
            StitchTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: 1.5})


def test_anchors_that_train_anyway_get_no_share_of_the_steps():
    model = image_model({})
    stitches = list(model.space)
    small, large = (model.space.anchor_stitch(i).key for i in (0, -1))
    for always, shared in (([], {small, large}), ([large], {small}), ([small], {large}), ([small, large], set())):
        sampler = StitchSampler(stitches, interval_count=3, anchor_share=0.5, always=always)
        drawn = [sampler.draw(step, {}) for step in range(2000)]
        assert {key for key in (small, large) if drawn.count(key) > 400} == shared


def test_the_trainer_shares_draws_among_anchors_that_do_not_train_anyway(tmp_path):
    for options, large in (({}, True), ({"train_teacher": True}, False), ({"inplace_teacher": False}, True)):
        run = image_trainer(image_model({}), tmp_path, anchor_share=1.0, **options)
        drawn = {run.draw(step).key for step in range(40)}
        assert drawn == {run.model.space.anchor_stitch(0).key} | ({run.largest.key} if large else set())
    with pytest.raises(ValueError, match="train_teacher is on and inplace_teacher off"):
        image_trainer(image_model({}), tmp_path, train_teacher=True, inplace_teacher=False)


def test_norms_that_train_follow_the_batches_also_in_a_model_set_to_training_before(tmp_path):
    def run(early):
        model = StitchedSwinForImageClassification.from_anchors(
            build("swin"), adapter_norm="batch", across_stages=True, rescale="bilinear", adapter="bottleneck"
        )
        model.train(early)
        model.calibrate([{"pixel_values": Pictures(16).pixels}], progress=False)
        model.attach_pst(PSTConfig(rank=2, stitching_rank="full"))
        image_trainer(model, tmp_path, max_steps=3, sampling="uniform").train()
        return {n: t for n, t in model.stitching_layers.named_buffers() if t.is_floating_point()}

    one, other = run(False), run(True)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
