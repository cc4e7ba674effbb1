"""Stitches with a LoRA of their own: anchors train first, as alone, and are frozen while the stitches train."""

import pytest
import torch
from conftest import FAMILIES, fresh, ids_like, randomise
from tiny_runs import ROWS, dataset
from transformers import TrainerCallback

from stitched_llama import PSTConfig, StitchedLlamaForCausalLM, StitchTrainer, StitchTrainingArguments
from stitched_llama.training import Collator

PST = PSTConfig(rank=4, stitch_rank=3, stitching_rank=2)


def trainer(model, folder, **options):
    args = StitchTrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=4, global_batch_size=0, learning_rate=1e-2, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_steps=100, **{"save_strategy": "no", **options},
    )  # fmt: skip
    return StitchTrainer(model=model, args=args, train_dataset=dataset(ROWS), data_collator=Collator(0))


def outputs(model, ids):
    with torch.no_grad():
        return {stitch.key: model(ids, stitch_id=stitch.key).logits for stitch in model.space}


@pytest.fixture
def model(anchors):
    torch.manual_seed(0)
    made = StitchedLlamaForCausalLM.from_anchors(anchors["unequal"])
    made.attach_pst(PST)
    return made


def test_attaching_changes_no_bit_and_anchors_never_see_the_stitches_part(anchors):
    ids = ids_like(2, 9)
    plain = fresh(anchors["three"], **FAMILIES["three"][1])
    before = outputs(plain, ids)
    plain.attach_pst(PST)
    assert all(torch.equal(before[key], found) for key, found in outputs(plain, ids).items())
    for parameter in [*plain.stitch_lora.parameters(), *plain.stitch_bias.parameters()]:
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    for stitch in plain.space:
        same = torch.equal(before[stitch.key], plain(ids, stitch_id=stitch.key).logits)
        assert same == stitch.is_anchor


def test_counts_agree(model):
    assert model.trainable_parameters() == PST.trainable_params(model.space)
    for stitch in model.space:
        own = [name for name, _ in model.stitch_parameters(stitch.key)]
        assert any(name.startswith("stitch_lora") for name in own) == (not stitch.is_anchor)
        model.zero_grad()
        randomise(model)
        model(ids_like(2, 9), labels=ids_like(2, 9), stitch_id=stitch.key).loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(own)


def test_anchors_train_first_in_turn_and_stay_as_they_are_while_stitches_train(model, tmp_path):
    run, seen = trainer(model, tmp_path, anchors_first=0.5), []
    complete = run._complete_step

    def watched(student):
        complete(student)
        touched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        seen.append((student.key, touched, [group["lr"] for group in run.optimizer.param_groups]))

    run._complete_step = watched
    halfway = {}

    class Halfway(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                named = model.named_parameters()
                halfway.update({name: p.detach().clone() for name, p in named if name.startswith("anchors.")})

    run.add_callback(Halfway)
    run.train()
    assert [key for key, *_ in seen[:4]] == ["0[0:3]", "1[0:5]"] * 2
    assert all(touched == {"anchors"} for _, touched, _ in seen[:4])
    assert all(">" in key and "anchors" not in touched for key, touched, _ in seen[4:])
    for step, (_, _, rates) in enumerate(seen):
        phases = {group["phase"]: rate for group, rate in zip(run.optimizer.param_groups, rates)}
        if step not in (0, 4):  # where a warm-up begins
            assert (phases["anchors"] > 0) == (step < 4)
            assert (phases["stitches"] > 0) == (step >= 4)
    assert all(torch.equal(halfway[name], dict(model.named_parameters())[name]) for name in halfway)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n)


def test_each_anchor_learns_what_plain_lora_learns(model, anchors, tmp_path):
    """The same batches, schedule and start: the anchor inside the run ends with the weights that PEFT alone would reach."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForCausalLM

    run, batches = trainer(model, tmp_path, anchors_first=1.0), []
    step = run.training_step

    def recorded(wrapped, inputs, *args):
        batches.append({name: tensor.clone() for name, tensor in inputs.items()})
        return step(wrapped, inputs, *args)

    alone = AutoModelForCausalLM.from_pretrained(anchors["unequal"][0])
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    peer = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=names), alone)
    own = {
        n.removeprefix("anchors.0."): p
        for n, p in model.named_parameters()
        if n.startswith("anchors.0.") and "lora_" in n
    }
    named = {n: p for n, p in peer.named_parameters() if "lora_" in n}
    assert own.keys() == named.keys()
    for name, parameter in named.items():
        parameter.data.copy_(own[name])
    run.training_step = recorded
    run.train()
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2, weight_decay=0.0)
    for number, batch in list(enumerate(batches))[::2]:  # its turns
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * run.lr_scheduler.lr_lambdas[0](number)
        loss = peer(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in named.items():
        torch.testing.assert_close(own[name], parameter, atol=1e-5, rtol=1e-4)


def test_a_bundle_holds_the_stitches_lora_and_loads_whole_and_in_part(model, tmp_path):
    randomise(model)
    ids = ids_like(2, 9)
    wanted = outputs(model, ids)
    model.save_pretrained(tmp_path / "bundle")
    again = StitchedLlamaForCausalLM.from_pretrained(tmp_path / "bundle")
    assert all(torch.equal(wanted[key], found) for key, found in outputs(again, ids).items())
    for key in ("0[0:3]", model.keys[2]):
        part = StitchedLlamaForCausalLM.from_pretrained(tmp_path / "bundle", stitch_id=key)
        assert torch.equal(part(ids, stitch_id=key).logits, wanted[key])
    assert part.stitch_lora is not None


def test_a_run_resumes_in_either_phase(anchors, tmp_path):
    def run(folder, **options):
        torch.manual_seed(0)
        made = StitchedLlamaForCausalLM.from_anchors(anchors["unequal"])
        made.attach_pst(PST)
        return trainer(made, folder, **options)

    whole = run(tmp_path / "whole")
    whole.train()
    run(tmp_path / "kept", save_strategy="steps", save_steps=3).train()
    for step in (3, 6):
        again = run(tmp_path / "kept")
        again.train(resume_from_checkpoint=str(tmp_path / f"kept/checkpoint-{step}"))
        for name, parameter in again.model.named_parameters():
            assert torch.equal(parameter, dict(whole.model.named_parameters())[name]), (step, name)


def test_what_does_not_fit_is_refused(anchors):
    shared = fresh(anchors["unequal"], PSTConfig(rank=2))
    with pytest.raises(ValueError, match="share one LoRA"):
        shared.train_only("anchors")
    parted = fresh(anchors["unequal"], PST)
    with pytest.raises(ValueError, match="'anchors', 'stitches' or None"):
        parted.train_only("all")
    with pytest.raises(ValueError, match="stitch_rank on anchor 0 is 99"):
        fresh(anchors["unequal"]).attach_pst(PSTConfig(rank=2, stitch_rank=99))
    with pytest.raises(ValueError, match="full trains everything"):
        PSTConfig(full=True, stitch_rank=2)
