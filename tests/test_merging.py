"""PST merged into the weights: every stitch computes what it did, and what was trained is never lost."""

import copy
import pickle

import pytest
import torch
from conftest import FAMILIES, fresh, ids_like, randomise
from image_anchors import FAMILIES as IMAGE_FAMILIES
from image_anchors import build
from peft.tuners.tuners_utils import BaseTunerLayer
from test_bundle import IDS, load, logits
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from stitched_llama import PSTConfig
from stitched_llama.cli import chat, main
from stitched_llama.training import evaluate_stitches

SETTINGS = {
    "paper": PSTConfig(rank=4, stitching_rank=3),
    "own LoRA": PSTConfig(rank=4, stitch_rank=2),
    "no bias": PSTConfig(rank=2, stitch_bias=False),
    "layers whole": PSTConfig(rank=2, stitching_rank="full"),
}


def assert_close(one, other, keys=None, tolerance=1e-5):
    """Logits equal to 1e-5 of the largest, which is some 20 in these models."""
    for key in keys or one.keys:
        found, wanted = logits(one, key), logits(other, key)
        torch.testing.assert_close(found, wanted, atol=tolerance * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("family", "named"), [("three", "paper"), ("equal", "paper"), *(("unequal", n) for n in SETTINGS)]
)
def test_every_stitch_computes_what_it_did(family, named, anchors):
    settings = SETTINGS[named]
    model = fresh(anchors[family], settings, **FAMILIES[family][1])
    view = model.pinned(2)
    merged = copy.deepcopy(model)
    left = merged.merge_pst()
    assert left == tuple(
        name for name, there in (("stitch_bias", settings.stitch_bias), ("stitch_lora", settings.stitch_rank)) if there
    )
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    assert_close(merged, model)
    assert torch.equal(logits(pickle.loads(pickle.dumps(merged)), 2), logits(merged, 2))
    assert merged.pinned(2).is_merged
    assert not view.is_merged
    how = {"max_new_tokens": 5, "do_sample": False, "stitch_id": 2}
    assert torch.equal(merged.generate(IDS, **how), model.generate(IDS, **how))


def test_half_precision_is_rounded_once(anchors):
    exact = fresh(anchors["unequal"], PSTConfig(rank=4, stitching_rank=3))
    half = fresh(anchors["unequal"], PSTConfig(rank=4, stitching_rank=3), dtype="bfloat16")
    half.merge_pst()
    layer = exact.anchors[1].model.layers[2].self_attn.q_proj
    wanted = (
        layer.base_layer.weight.bfloat16().float() + layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    found = half.anchors[1].model.layers[2].self_attn.q_proj.weight
    assert torch.equal(found, wanted.bfloat16())
    for key in half.keys:
        assert logits(half, key).dtype == torch.bfloat16
        assert cosine_similarity(logits(half, key).float(), logits(exact, key), dim=-1).min() > 0.98, key


def test_one_size_merges_the_lora_of_the_stitches_too(anchors, tmp_path):
    model = fresh(anchors["unequal"], SETTINGS["own LoRA"])
    model.save_pretrained(tmp_path)
    for key in model.keys:
        part = load(tmp_path, stitch_id=key, merge=True)
        assert part.stitch_lora is None
        assert (part.stitch_bias is None) == model.space[key].is_anchor
        assert_close(part, model, [key])


def test_evaluation_of_a_merged_model_finds_the_same(made):
    rows = ids_like(4, 12)
    batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}]
    wanted = evaluate_stitches(made, batches, progress=False)["loss"]
    made.table = made.table.with_metrics("loss", wanted, decides=True)
    made.merge_pst()
    assert evaluate_stitches(made, batches, progress=False)["loss"] == pytest.approx(wanted, rel=1e-4)
    assert made.table_to_save().metrics["loss"] == wanted, "they hold for the merged weights too"
    with torch.no_grad():
        made.stitch_bias.vectors[made.keys[0]].add_(1)
    assert not made.table_to_save().metrics


@pytest.mark.parametrize("loader", [load, AutoModelForCausalLM.from_pretrained])
def test_bundles_load_merged(loader, made, bundle):
    merged = loader(bundle, merge=True)
    assert merged.is_merged
    assert merged.table == made.table
    assert_close(merged, made)


def test_what_was_merged_cannot_be_lost(made, bundle, tmp_path):
    merged = load(bundle, merge=True)
    for lose in (merged.save_pretrained, merged.pinned(0).save_pretrained):
        with pytest.raises(ValueError, match="merged into the anchors' weights.*without merge to save it"):
            lose(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    with pytest.raises(ValueError, match="cannot be saved by itself: it carries PST"):
        merged.anchors[0].save_pretrained(tmp_path / "lost")
    with pytest.raises(ValueError, match="PST was merged into the weights: load the bundle without merge"):
        merged.attach_pst(PSTConfig(rank=2))
    with pytest.raises(ValueError, match="merged already"):
        merged.merge_pst()
    with pytest.raises(ValueError, match="another adapter would undo it"):
        merged.add_adapter(None)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_anchors_are_refused_with_the_way_out(bits, bundle):
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    with pytest.raises(ValueError, match=f"anchors in {bits} bits, .* without quantization_config"):
        load(bundle, quantization_config=settings, merge=True)
    if bits == 8:
        model = load(bundle, quantization_config=settings)
        before = logits(model, 2)
        with pytest.raises(ValueError, match="anchors in 8 bits"):
            model.merge_pst()
        assert torch.equal(logits(model, 2), before)


@pytest.mark.parametrize("pst", [None, PSTConfig(full=True)], ids=["none", "full"])
def test_nothing_to_merge_changes_nothing(pst, anchors, tmp_path):
    model = fresh(anchors["unequal"], pst)
    model.save_pretrained(tmp_path)
    merged = load(tmp_path, merge=True)
    assert not merged.is_merged
    assert_close(merged, model, tolerance=0)
    merged.save_pretrained(tmp_path / "again")
    assert_close(load(tmp_path / "again"), model, tolerance=0)


@pytest.mark.parametrize("family", ["vit", "resnet", "convnext", "swin"])
def test_images_too(family):
    stitched_class, size, options = IMAGE_FAMILIES[family]
    torch.manual_seed(0)
    model = stitched_class.from_anchors(build(family), **options)
    model.attach_pst(PSTConfig(rank=2))
    randomise(model)
    merged = copy.deepcopy(model)
    merged.merge_pst()
    pixels = torch.randn(2, 3, *[merged.config.image_size] * 2)
    with torch.no_grad():
        for key in model.keys:
            found, wanted = (m(pixels, stitch_id=key).logits for m in (merged, model))
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_chat_merges_where_it_can(bundle, tokenizer, monkeypatch, capsys):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(bundle)
    seen = []
    monkeypatch.setattr(chat, "converse", lambda conversation: seen.append(conversation.model.is_merged))
    for extra in ([], ["--no-merge"], ["--load-in-8bit"]):
        assert main(["chat", str(bundle), "--max-new-tokens", "4", *extra]) == 0
    assert seen == [True, False, False]
