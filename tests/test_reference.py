"""Stitches against references made by hand: merged weights in plain modules, settings that must arrive."""

from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, fresh, ids_like
from test_calibration import padded_batches
from tiny_runs import stitched_model, trainer
from transformers import LlamaForCausalLM

from stitched_llama import PSTConfig, StitchedLlamaForCausalLM, StitchSampler, StitchTrainingArguments
from stitched_llama.bundles import fingerprint_tensors
from stitched_llama.cli.chat import PAPER, sampling

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def merged(layer):
    """W + B A of a layer that PEFT wrapped, from its tensors."""
    return layer.base_layer.weight + layer.lora_B["default"].weight @ layer.lora_A["default"].weight


@torch.no_grad()
def reference_logits(model, stitch, ids):
    """The stitch as plain LLaMA blocks with LoRA, update and bias merged into their weights."""
    plain = [LlamaForCausalLM.from_pretrained(anchor["name_or_path"]) for anchor in model.config.anchors]
    bias = model.stitch_bias.vectors[stitch.key]
    hidden, taken = plain[stitch.segments[0].anchor].model.embed_tokens(ids), 0
    length = ids.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    for number, segment in enumerate(stitch.segments):
        if number:
            layer = model.stitching_layers[stitch.junctions[number - 1].layer].proj
            hidden = hidden @ merged(layer).T + layer.base_layer.bias
        anchor = plain[segment.anchor]
        positions = torch.arange(length)[None]
        rotary = anchor.model.rotary_emb(hidden, position_ids=positions)
        for block in range(segment.start, segment.stop):
            ours = model.anchors[segment.anchor].model.layers[block].self_attn
            target = anchor.model.layers[block]
            for name in NAMES:
                linear = getattr(target.self_attn, name)
                linear.weight.copy_(merged(getattr(ours, name)))
                linear.bias = torch.nn.Parameter(bias[taken : taken + linear.out_features].clone())
                taken += linear.out_features
            hidden = target(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    assert taken == len(bias)
    return anchor.lm_head(anchor.model.norm(hidden))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stitch_is_its_merged_weights_in_plain_blocks(family, stitched):
    model, ids = stitched(family, pst=True), ids_like(2, 9)
    for stitch in model.space:
        with torch.no_grad():
            found = model(input_ids=ids, stitch_id=stitch.key).logits
        torch.testing.assert_close(found, reference_logits(model, stitch, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*junctions do not fit.*:UserWarning")
def test_ridge_shrinks_the_stitching_layers(anchors):
    norms = []
    for ridge in (1e-8, 1.0, 100.0):
        model = fresh(anchors["unequal"])
        model.calibrate(padded_batches(4), ridge=ridge, row_weights="none", progress=False)
        norms.append(sum(float(layer.core.weight.norm()) for layer in model.stitching_layers.values()))
    assert norms[0] > 1.2 * norms[1] > 10 * norms[2]


@pytest.mark.parametrize(
    "options",
    [
        {"floor": 0.0},
        {"anchor_share": 0.9, "train_teacher": True},
        {"sampling_warmup": 1.0},
        {"interval_count": 2},
        {"seed": 5},
        {},
    ],  # fmt: skip
)
def test_trainer_draws_as_its_arguments_say(options, anchors, tmp_path):
    run = trainer(stitched_model(anchors["unequal"]), tmp_path, max_steps=40, **options)
    run.state.max_steps = 40
    run.importance.averages.update({s.key: float(s.stitch_id) for s in run.stitches})
    args = run.args
    wanted = StitchSampler(
        run.stitches, interval_count=args.interval_count, warmup_steps=round(args.sampling_warmup * 40), floor=args.floor,
        anchor_share=args.anchor_share, seed=args.seed, always=["1[0:5]"] * args.train_teacher,
    )  # fmt: skip
    for name, value in options.items():
        assert getattr(args, name) == value
    averages = run.importance.averages
    assert [run.draw(step).key for step in range(40)] == [wanted.draw(step, averages) for step in range(40)]


def test_paper_settings_and_the_greedy_zero():
    def options(**given):
        return SimpleNamespace(**{"paper": False, "temperature": None, "top_p": None, **given})

    assert sampling(options(paper=True)) == PAPER == {"num_beams": 4, "do_sample": True, "top_p": 0.75}
    assert sampling(options()) == sampling(options(temperature=0.0)) == {"do_sample": False}
    assert sampling(options(temperature=0.5)) == {"do_sample": True, "temperature": 0.5, "top_p": 1.0}
    for given, named in (
        ({"paper": True, "top_p": 0.5}, "--paper sets"), ({"top_p": 0.0}, "--top-p is 0"), ({"temperature": -1.0}, "-1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            sampling(options(**given))


def test_generation_config_and_shortest_context_come_back(anchors, tmp_path):
    model = fresh(anchors["unequal"])
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "b")
    again = StitchedLlamaForCausalLM.from_pretrained(tmp_path / "b")
    assert again.generation_config.max_new_tokens == 7
    short = LlamaForCausalLM.from_pretrained(anchors["unequal"][0])
    short.config.max_position_embeddings = 33
    short.save_pretrained(tmp_path / "short")
    mixed = StitchedLlamaForCausalLM.from_anchors([str(tmp_path / "short"), anchors["unequal"][1]])
    assert mixed.config.max_position_embeddings == 33


def test_fingerprint_reads_sixteen_pages_of_a_tensor():
    tensor = torch.zeros(1 << 20)
    before = fingerprint_tensors({"w": tensor})
    pages = [(4 * len(tensor) - 4096) * page // 15 // 4 + 1 for page in range(16)]
    for offset in (0, 1000):  # the beginning and the end of each page
        for page in pages:
            changed = tensor.clone()
            changed[page + offset] = 1.0
            assert fingerprint_tensors({"w": changed}) != before, (page, offset)


def test_accumulation_that_contradicts_the_global_batch_is_refused(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    with pytest.raises(ValueError, match="gradient_accumulation_steps 3 and global_batch_size 128.*32 times 4"):
        StitchTrainingArguments(gradient_accumulation_steps=3, **settings)
    assert StitchTrainingArguments(**settings).gradient_accumulation_steps == 32
    own = StitchTrainingArguments(gradient_accumulation_steps=3, global_batch_size=0, **settings)
    assert own.gradient_accumulation_steps == 3


def test_importance_of_another_score_is_not_continued(anchors, tmp_path):
    model = stitched_model(anchors["unequal"])
    run, key = trainer(model, tmp_path, importance="snip"), model.keys[1]
    run.importance.averages[key] = 5.0
    run.save_importance()
    assert trainer(model, tmp_path, importance="snip").importance.averages == {key: 5.0}
    assert trainer(model, tmp_path, importance="loss").importance.averages == {}


def test_importance_publishes_once_training_rated_the_stitches(anchors, tmp_path):
    model = stitched_model(anchors["unequal"])
    model.table = model.table.with_metrics("loss_before", {s.key: -s.stitch_id for s in model.space})
    assert model.published == list(model.space)  # the front of what was measured
    run = trainer(model, tmp_path, interval_count=1)
    run.importance.averages.update({s.key: float(s.stitch_id == 2) for s in model.space})
    run.save_importance()
    assert [s.stitch_id for s in model.published] == [0, 2, len(model.space) - 1]


def test_pst_settings_must_be_whole_numbers(anchors):
    for rank in (2.5, "8", True):
        with pytest.raises(ValueError, match="whole rank"):
            PSTConfig(rank=rank).ranks(fresh(anchors["unequal"]).space)
