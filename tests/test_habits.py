"""What people do with any model of Transformers: the same comes of it here, or a clear refusal."""

import pickle

import pytest
import torch
from conftest import fresh, ids_like, randomise, spread
from image_anchors import vit
from peft import LoraConfig, get_peft_model
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTModel,
)

from stitched_llama import PSTConfig, StitchedLlamaForCausalLM, StitchedViTForImageClassification
from stitched_llama.training import pico_anchor

IDS = ids_like(1, 9, seed=5)
PLAIN = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
ROWS = [{"input_ids": row, "labels": row.clone()} for row in ids_like(8, 12)]


@torch.no_grad()
def logits(model, ids=IDS, **how):
    return model(ids, **how).logits


def plain_trainer(model, folder, train=None, evaluate=None, **options):
    how = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    arguments = TrainingArguments(str(folder), **how | options)
    return Trainer(model, arguments, train_dataset=train, eval_dataset=evaluate)


# ---- generation


def test_guidance_runs_the_stitch_of_the_call(stitched, anchors):
    model = stitched("unequal")
    for number, folder in enumerate(anchors["unequal"]):
        wanted = LlamaForCausalLM.from_pretrained(folder).generate(IDS, guidance_scale=2.5, **PLAIN)
        stitch = model.space.anchor_stitch(number)
        assert torch.equal(model.generate(IDS, stitch_id=stitch.key, guidance_scale=2.5, **PLAIN), wanted), number
    assert not torch.equal(wanted, model.generate(IDS, stitch_id=stitch.key, **PLAIN)), "guidance changed nothing"


@pytest.mark.parametrize("kind", ["one size", "another model", "the same bundle again"])
def test_an_assistant_that_is_a_model_drafts_as_it_would_alone(kind, anchors, tmp_path, monkeypatch):
    model = fresh(anchors["unequal"], PSTConfig(rank=2))
    model.save_pretrained(tmp_path)
    if kind == "another model":
        assistant = LlamaForCausalLM.from_pretrained(anchors["unequal"][0])
    else:
        how = {"stitch_id": 0} if kind == "one size" else {}
        assistant = StitchedLlamaForCausalLM.from_pretrained(tmp_path, **how)
        assistant.config.default_stitch_id = 0
    ran, choose = [], StitchedLlamaForCausalLM._pinned_or

    def chosen(self, stitch_id):
        stitch = choose(self, stitch_id)
        ran.append((self is assistant, stitch.stitch_id))
        return stitch

    wanted = model.generate(IDS, stitch_id=4, **PLAIN)
    monkeypatch.setattr(StitchedLlamaForCausalLM, "_pinned_or", chosen)
    assert torch.equal(model.generate(IDS, stitch_id=4, assistant_model=assistant, **PLAIN), wanted)
    assert set(ran) == {(False, 4)} | ({(True, 0)} if kind != "another model" else set())


def test_continuous_batching_is_refused(stitched):
    model = stitched("unequal")
    for start in (model.generate_batch, model.init_continuous_batching, model.pinned(0).generate_batch):
        with pytest.raises(ValueError, match="continuous batching .* knows neither sizes"):
            start([[5, 6, 7]])


# ---- hidden states and embeddings


def test_hidden_states_of_an_anchor_are_those_of_the_plain_model(stitched, anchors):
    model = stitched("unequal")
    for number, folder in enumerate(anchors["unequal"]):
        with torch.no_grad():
            wanted = LlamaForCausalLM.from_pretrained(folder)(IDS, output_hidden_states=True).hidden_states
            found = model(IDS, stitch_id=model.space.anchor_stitch(number).key, output_hidden_states=True)
        assert len(found.hidden_states) == len(wanted)
        for one, other in zip(found.hidden_states, wanted):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        assert "last_hidden_state" not in found


def test_hidden_states_by_number_count_on_the_route(stitched):
    model = stitched("unequal")
    for stitch in model.space:
        with torch.no_grad():
            every = model(IDS, stitch_id=stitch.key, output_hidden_states=True).hidden_states
            for number in (-1, -2, 0, stitch.depth):
                found = model(IDS, stitch_id=stitch.key, output_hidden_states=[number]).hidden_states
                kept = [i for i, state in enumerate(found) if state is not None]
                assert kept == [number % (stitch.depth + 1)], (stitch.key, number)
                assert torch.equal(found[kept[0]], every[number])


def test_embeddings_of_another_anchor_are_refused(stitched):
    model = stitched("unequal")
    embedded = model.get_input_embeddings()(IDS)  # of the default stitch, the large anchor
    with pytest.raises(ValueError, match=r"48 wide, stitch 0 .* of 32: embed with model.pinned\(0\)"):
        model(inputs_embeds=embedded, stitch_id=0)
    own = model.pinned(0).get_input_embeddings()(IDS)
    assert torch.equal(logits(model, None, inputs_embeds=own, stitch_id=0), logits(model, stitch_id=0))


# ---- PEFT on top


@pytest.mark.filterwarnings(
    "ignore:.*with PEFT for a second time:UserWarning", "ignore:.*already found a `peft_config`:UserWarning"
)
def test_another_adapter_on_top_of_pst_is_refused_and_changes_nothing(anchors):
    model = fresh(anchors["unequal"], PSTConfig(rank=2))
    before = [logits(model, stitch_id=key) for key in model.keys]
    mine = LoraConfig(target_modules=["q_proj"])
    for attempt in (
        lambda: get_peft_model(model, mine),
        lambda: get_peft_model(model, mine, adapter_name="mine"),
        lambda: model.add_adapter(mine),
        lambda: model.load_adapter("somewhere"),
    ):
        with pytest.raises(ValueError, match="carries PST already"):
            attempt()
    assert all(torch.equal(logits(model, stitch_id=key), old) for key, old in zip(model.keys, before))


# ---- Transformers' own Trainer


def test_a_plain_trainer_brings_back_the_best_checkpoint_and_resumes(anchors, tmp_path):
    def model():
        return fresh(anchors["unequal"], PSTConfig(rank=2))

    options = {"per_device_train_batch_size": 4, "learning_rate": 5e-2, "lr_scheduler_type": "constant"}
    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "num_train_epochs": 4}
    others = [{"input_ids": row, "labels": row.clone()} for row in ids_like(4, 12, seed=9)]
    trainer = plain_trainer(model(), tmp_path / "best", ROWS, others, **options | best)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-5)

    first = plain_trainer(model(), tmp_path / "run", ROWS, max_steps=4, save_steps=4, **options)
    first.train()
    again = plain_trainer(model(), tmp_path / "run", ROWS, max_steps=4, save_steps=4, **options)
    again.train(resume_from_checkpoint=True)
    for key in first.model.keys:
        assert torch.equal(logits(again.model, stitch_id=key), logits(first.model, stitch_id=key)), key


def test_a_bundles_tensors_load_as_a_state_dict(anchors, tmp_path):
    from safetensors.torch import load_file

    model, other = (fresh(anchors["unequal"], PSTConfig(rank=2), seed=seed) for seed in (0, 1))
    for dtype in (None, "int8"):
        model.save_pretrained(tmp_path / str(dtype), stitching_dtype=dtype)
        tensors = load_file(tmp_path / str(dtype) / "model.safetensors")
        randomise(other, 2)
        assert other.load_state_dict(tensors) == ([], [])
        bundle = StitchedLlamaForCausalLM.from_pretrained(tmp_path / str(dtype))
        assert all(torch.equal(logits(other, stitch_id=key), logits(bundle, stitch_id=key)) for key in model.keys)
    name = next(iter(tensors))
    del tensors[name]
    with pytest.raises(RuntimeError, match=f"lack 1 of .*, the first is {name}"):
        other.load_state_dict(tensors)
    assert other.load_state_dict(tensors, strict=False).missing_keys == [name]
    assert other.load_state_dict(model.state_dict()).missing_keys == []  # and whole models as ever


def test_label_smoothing_shifts_labels_as_for_the_plain_model(stitched, anchors, tmp_path):
    plain = LlamaForCausalLM.from_pretrained(anchors["unequal"][-1])
    wanted, found = (
        plain_trainer(model, tmp_path, evaluate=ROWS, label_smoothing_factor=0.1).evaluate()["eval_loss"]
        for model in (plain, stitched("unequal"))
    )
    assert found == pytest.approx(wanted, rel=1e-5)


def test_accumulated_batches_of_pictures_weigh_as_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 7} for i in range(8)]
    logged = []
    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = StitchedViTForImageClassification.from_anchors([vit(16, 3), vit(24, 3)])
        model.attach_pst(PSTConfig(rank=2))
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_grad_norm": 0}
        trainer = plain_trainer(model, tmp_path, rows, max_steps=1, logging_steps=1, save_strategy="no", **options)
        trainer.train()
        logged.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert logged[1] == pytest.approx(logged[0], rel=1e-4)


# ---- one size


def test_a_view_is_pickled_and_hooks_come_once(anchors):
    model = fresh(anchors["unequal"])
    view = model.pinned(2)
    again = pickle.loads(pickle.dumps(view))
    assert torch.equal(logits(again), logits(model, stitch_id=2))
    for asked in (view, model, model.pinned(2)):
        with torch.no_grad():
            states = asked(IDS, stitch_id=2, output_hidden_states=True).hidden_states
        assert len(states) == model.space[2].depth + 1


def test_one_size_is_pickled_and_tied_again(tmp_path):
    folders = [str(tmp_path / name) for name in ("small", "large")]
    for folder, (width, depth) in zip(folders, ((32, 2), (48, 3))):
        tied = pico_anchor(width, depth, 4, 2, vocab_size=260, tie_word_embeddings=True)
        spread(tied).save_pretrained(folder)
    fresh(folders, PSTConfig(rank=2)).save_pretrained(tmp_path / "bundle")
    for number in range(len(StitchedLlamaForCausalLM.from_pretrained(tmp_path / "bundle").keys)):
        part = StitchedLlamaForCausalLM.from_pretrained(tmp_path / "bundle", stitch_id=number)
        wanted = logits(part)
        part.tie_weights()  # as evaluation harnesses do
        assert torch.equal(logits(pickle.loads(pickle.dumps(part))), wanted), number


# ---- image checkpoints as the Hub has them


def test_checkpoints_without_a_head_get_one(tmp_path):
    folders = []
    for width in (16, 24):
        folders.append(str(tmp_path / str(width)))
        ViTModel(vit(width, 3).config, add_pooling_layer=False).save_pretrained(folders[-1])
    with pytest.raises(ValueError, match="has no classifier .*: pass num_labels or id2label for a new one"):
        StitchedViTForImageClassification.from_anchors(folders)
    model = StitchedViTForImageClassification.from_anchors(folders, num_labels=5)
    pixels = torch.randn(2, 3, 16, 16)
    assert logits(model, pixels).shape == (2, 5)
    model.save_pretrained(tmp_path / "bundle")
    again = StitchedViTForImageClassification.from_pretrained(tmp_path / "bundle")
    assert torch.equal(logits(again, pixels), logits(model, pixels))


def test_distilled_deits_need_one_new_head(tmp_path):
    how = {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "num_labels": 7}
    folders = []
    for width in (16, 24):
        folders.append(str(tmp_path / str(width)))
        config = DeiTConfig(hidden_size=width, intermediate_size=2 * width, **how)
        anchor = DeiTForImageClassificationWithTeacher(config)
        anchor.save_pretrained(folders[-1])
    with pytest.raises(ValueError, match="16 has two heads, .*: pass num_labels or id2label"):
        StitchedViTForImageClassification.from_anchors(folders)
    with pytest.raises(ValueError, match="anchor 1 is a DeiTForImageClassificationWithTeacher, which has two heads"):
        StitchedViTForImageClassification.from_anchors([DeiTForImageClassification(config), anchor])
    model = StitchedViTForImageClassification.from_anchors(folders, num_labels=5)
    pixels = torch.randn(2, 3, 16, 16)
    model.save_pretrained(tmp_path / "bundle")
    again = StitchedViTForImageClassification.from_pretrained(tmp_path / "bundle")
    assert torch.equal(logits(again, pixels), logits(model, pixels))
