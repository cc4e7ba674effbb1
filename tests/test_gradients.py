"""Which tensors a stitch trains, with and without activation checkpointing, and what a step's gradient is."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, fresh, ids_like
from tiny_runs import stitched_model, trainer
from transformers import TrainerCallback

from stitched_llama import PSTConfig
from stitched_llama.training import (
    batches,
    collate_images,
    evaluate_plain,
    evaluate_stitches,
    response_scores,
    spearman,
)

IDS = ids_like(3, 10)


def gradients(model, key, **kwargs):
    model.zero_grad(set_to_none=True)
    model(IDS, labels=IDS, stitch_id=key, use_cache=False, **kwargs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def counted(model):
    """Counts the runs of every block of the first anchor."""
    runs = []
    for block in model.anchors[0].model.layers:
        block.self_attn.register_forward_hook(lambda *args: runs.append(1))
    return runs


@pytest.mark.parametrize("reentrant", [False, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_under_activation_checkpointing_equal_those_without(family, reentrant, anchors):
    model = fresh(anchors[family], PSTConfig(rank=3, stitching_rank=2), **FAMILIES[family][1]).train()
    plain = {key: gradients(model, key) for key in model.keys}
    model.activation_checkpointing_enable({"use_reentrant": reentrant} if reentrant is not None else None)
    runs = counted(model)
    for stitch in model.space:
        runs.clear()
        found = gradients(model, stitch.key)
        first = sum(1 for anchor, _ in stitch.blocks() if anchor == 0)
        assert len(runs) == 2 * first, "checkpointing does not recompute"
        own = {name for name, _ in model.stitch_parameters(stitch.key)}
        for name, gradient in found.items():
            assert (gradient is not None) == (plain[stitch.key][name] is not None) == (name in own), (stitch.key, name)
            if gradient is not None:
                torch.testing.assert_close(gradient, plain[stitch.key][name], atol=1e-6, rtol=1e-5)
                assert gradient.any(), (stitch.key, name)


def test_two_stitches_in_one_graph_keep_their_own_biases(anchors):
    """Recomputation of the first happens after the second ran: module state would give it the other's biases."""
    model = fresh(anchors["unequal"], PSTConfig(rank=2)).train()
    one, other = model.keys[1], model.keys[4]
    wanted = {name: [g for g in pair if g is not None] for name, pair in _pairs(model, one, other)}
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.zero_grad(set_to_none=True)
    (
        model(IDS, labels=IDS, stitch_id=one, use_cache=False).loss
        + model(IDS, labels=IDS, stitch_id=other, use_cache=False).loss
    ).backward()
    for name, parameter in model.named_parameters():
        if wanted[name]:
            torch.testing.assert_close(parameter.grad, sum(wanted[name]), atol=1e-6, rtol=1e-5)


def _pairs(model, one, other):
    first, second = gradients(model, one), gradients(model, other)
    return [(name, (first[name], second[name])) for name in first]


def test_at_birth_only_the_zero_side_of_lora_and_the_biases_move(anchors):
    model = fresh(anchors["unequal"])
    model.attach_pst(PSTConfig(rank=4))
    key = model.keys[2]
    for name, parameter in model.stitch_parameters(key):
        assert (parameter.detach() == 0).all() == (".lora_B." in name or name.startswith("stitch_bias")), name
    for name, gradient in gradients(model.train(), key).items():
        if gradient is not None:
            assert gradient.any() == (".lora_A." not in name), name


def test_stitch_parameters_name_the_route_alone(anchors):
    model = fresh(anchors["three"], PSTConfig(rank=2), **FAMILIES["three"][1])
    for stitch in model.space:
        own = dict(model.stitch_parameters(stitch.key))
        blocks = {
            (int(n.split(".")[1]), int(n.split("layers.")[1].split(".")[0])) for n in own if n.startswith("anchors")
        }
        assert blocks == set(stitch.blocks())
        assert {n.split(".")[1] for n in own if n.startswith("stitching")} == {j.layer for j in stitch.junctions}
        assert [n for n in own if n.startswith("stitch_bias")] == [f"stitch_bias.vectors.{stitch.key}"]
        assert len(own) == 8 * stitch.depth + 2 * len(stitch.junctions) + 1


class Keep(TrainerCallback):
    """Keeps the gradients that reach the optimiser."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("distillation", "weight"), [("hard", 0.5), ("hard", 0.0), ("soft", 0.3), ("none", 0.5)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_a_step_is_the_taught_student_and_the_teacher_where_it_trains(
    trains, distillation, weight, checkpointing, anchors, tmp_path, monkeypatch
):
    model, keep, seen = stitched_model(anchors["unequal"]), Keep(), []
    run = trainer(
        model, tmp_path, [keep], max_steps=1, max_grad_norm=0, distillation=distillation, distillation_weight=weight,
        activation_checkpointing=checkpointing, sampling="uniform", anchor_share=0.0, train_teacher=trains,
        seed=9,
    )  # fmt: skip
    student, teacher = run.draw(0), model.space.anchor_stitch(-1)
    assert student.key != teacher.key
    twin = stitched_model(anchors["unequal"]).train()
    step = type(run).training_step
    monkeypatch.setattr(
        type(run),
        "training_step",
        lambda self, m, inputs, n=None: seen.append(dict(inputs)) or step(self, m, inputs, n),
    )
    run.train()
    (inputs,) = seen
    labels = inputs.pop("labels")[:, 1:]
    wanted = labels[labels != -100]

    def scores(key):
        return twin(**inputs, stitch_id=key, use_cache=False).logits[:, :-1][labels != -100]

    taught, logits = scores(teacher.key), scores(student.key)
    share = 0 if distillation == "none" else weight
    loss = (1 - share) * F.cross_entropy(logits, wanted)
    if trains:
        loss = loss + F.cross_entropy(taught, wanted)
    if distillation == "hard":
        loss = loss + share * F.cross_entropy(logits, taught.detach().argmax(-1))
    elif distillation == "soft":
        target = taught.detach().softmax(-1)
        loss = loss + share * (target * (target.log() - logits.log_softmax(-1))).sum() / len(wanted)
    loss.backward()
    own = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    assert set(own) == set(keep.gradients)
    for name, gradient in keep.gradients.items():
        torch.testing.assert_close(gradient, own[name], atol=1e-6, rtol=1e-4)
    (key,) = run.importance.averages
    assert key == student.key


def test_importance_is_read_from_the_student_alone(anchors, tmp_path):
    model = stitched_model(anchors["unequal"])
    run = trainer(
        model, tmp_path, max_steps=1, importance="snip", distillation="none", sampling="uniform", train_teacher=True,
        anchor_share=0.0, seed=9,
    )  # fmt: skip
    key, twin = run.draw(0).key, stitched_model(anchors["unequal"]).train()
    assert key != "1[0:5]"
    batch = next(iter(run.get_train_dataloader()))
    run.train()
    twin(**batch, stitch_id=key, use_cache=False).loss.backward()
    wanted = sum(float((p * p.grad).detach().abs().sum()) for p in twin.parameters() if p.grad is not None)
    assert run.importance.averages == {key: pytest.approx(wanted, rel=1e-3)}


# ---- evaluation


def test_response_scores_by_hand():
    logits = torch.zeros(2, 4, 3)
    logits[0, 1, 2] = logits[0, 2, 0] = 50.0  # right at both labels
    logits[1, 1, 1] = 50.0  # wrong at the first, even at the second
    labels = torch.tensor([[-100, -100, 2, 0], [-100, -100, 0, 0]])
    loss, count, exact = response_scores(logits, labels)
    assert loss.tolist() == pytest.approx([0.0, 50.0 + torch.tensor(3.0).log().item()], abs=1e-4)
    assert count.tolist() == [2, 2]
    assert exact.tolist() == [True, False]


def test_exact_match_equals_greedy_decoding(stitched):
    model, prompt = stitched("unequal", pst=True), ids_like(6, 8, seed=2)
    for stitch in model.space:
        greedy = model.generate(prompt, stitch_id=stitch.key, max_new_tokens=4, do_sample=False, eos_token_id=None)
        labels = greedy.clone()
        labels[:, :8] = -100
        labels[[1, 4], [8, 11]] += 1
        batch = {
            "input_ids": torch.where(labels >= 0, labels, greedy),
            "attention_mask": torch.ones_like(greedy),
            "labels": labels,
        }
        found = evaluate_stitches(model, [batch], [stitch.key], progress=False)
        assert found["exact_match"] == {stitch.key: pytest.approx(4 / 6)}, stitch.key
        with torch.no_grad():
            loss = model(batch["input_ids"], labels=labels, stitch_id=stitch.key).loss
        assert found["loss"][stitch.key] == pytest.approx(float(loss), rel=1e-4)


def test_evaluation_weighs_tokens_not_batches_and_restores_the_mode(stitched):
    model = stitched("unequal")
    rows = {"input_ids": ids_like(5, 9), "attention_mask": torch.ones(5, 9, dtype=torch.long), "labels": ids_like(5, 9)}
    rows["labels"][0, 2:] = -100
    split = [{name: t[start : start + 2] for name, t in rows.items()} for start in (0, 2, 4)]
    one, many = (evaluate_stitches(model, batches, progress=False) for batches in ([rows], iter(split)))
    assert set(one["loss"]) == set(model.keys)
    assert not model.training
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert many["exact_match"] == one["exact_match"]
    bare = {name: tensor for name, tensor in rows.items() if name != "labels"}
    for nothing in ([], [{**rows, "labels": torch.full((5, 9), -100)}], [bare], [rows, bare]):
        with pytest.raises(ValueError, match="no labels"):
            evaluate_stitches(model, nothing, progress=False)
    with pytest.raises(ValueError, match="a batch holds input_ids, attention_mask only"):
        evaluate_plain(model.pinned(0), [bare])


def test_batches_that_can_be_made_anew_are_not_kept(stitched):
    """Pictures of a held-out part may be more than the memory takes."""
    made, most = [], []

    class Batches:
        def __iter__(self):
            for seed in range(6):
                batch = {"input_ids": ids_like(2, 9, seed), "labels": ids_like(2, 9, seed)}
                made.append(weakref.ref(batch["input_ids"]))
                most.append(sum(tensor() is not None for tensor in made))
                yield batch

    model = stitched("unequal")
    found = evaluate_stitches(model, Batches(), progress=False)
    assert max(most) <= 3
    assert found == evaluate_stitches(model, list(Batches()), progress=False)


def test_batches_of_a_data_set_are_made_at_every_pass():
    rows = [{"labels": 1, "pixel_values": torch.ones(1, 2, 2)}] * 5
    found = batches(rows, collate_images, 2, limit=3)
    assert [[len(batch["labels"]) for batch in found] for _ in range(2)] == [[2, 1]] * 2


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert spearman([1, 1], [1, 2]) != spearman([1, 1], [1, 2])  # NaN
