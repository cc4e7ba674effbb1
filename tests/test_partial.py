"""Bundles in part: one size, only its shards, the published sizes, stitching layers in 8 bits."""

import inspect
import json
import shutil

import pytest
import torch
from conftest import fresh
from test_bundle import IDS, assert_equal, contents, load, logits, tensors
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from stitched_llama import PSTConfig, StitchedLlamaForCausalLM
from stitched_llama.bundles import CARD, WEIGHTS, dequantize_rows, quantize_rows
from stitched_llama.cli import main


@pytest.mark.parametrize("how", ["stitch_id", "key", "budget", "auto"])
def test_one_size_is_equal_and_holds_only_what_it_needs(how, made, bundle):
    for stitch in made.space:
        if how == "budget" and stitch.stitch_id not in (0, 2, len(made.space) - 1):
            continue
        wanted = {"stitch_id": {"stitch_id": stitch.stitch_id}, "key": {"stitch_id": stitch.key}}.get(
            how, {"budget": stitch.params} if how == "budget" else {"stitch_id": stitch.stitch_id}
        )
        part = (AutoModelForCausalLM if how == "auto" else StitchedLlamaForCausalLM).from_pretrained(bundle, **wanted)
        assert part.keys == [stitch.key]
        assert torch.equal(logits(part), logits(made, stitch.key))
        frozen = sum(p.numel() for n, p in part.named_parameters() if not p.requires_grad)
        assert frozen == stitch.params, stitch.key
        own = sum(p.numel() for _, p in made.stitch_parameters(stitch.key))
        assert sum(part.trainable_parameters().values()) == own
        other = made.keys[(stitch.stitch_id + 1) % len(made.keys)]
        with pytest.raises(ValueError, match="was not loaded: this model holds 1 of 6"):
            part(IDS, stitch_id=other)
        generated = [m.generate(IDS, stitch_id=stitch.key, max_new_tokens=4, do_sample=False) for m in (part, made)]
        assert torch.equal(*generated)


def test_one_size_can_be_saved_and_loaded_again(made, bundle, tmp_path):
    key = made.space[2].key
    load(bundle, stitch_id=2).save_pretrained(tmp_path / "part")
    again = load(tmp_path / "part")
    assert again.keys == [key]
    assert torch.equal(logits(again), logits(made, key))
    with pytest.raises(ValueError, match="stitch 0 .* is not in .*part: it holds"):
        load(tmp_path / "part", stitch_id=0)


def test_a_part_is_consistent_with_itself(made, tmp_path, capsys):
    """Palette gain needs both anchors: a part without them has none."""
    test = {stitch.key: 3.0 - stitch.stitch_id / 10 for stitch in made.space}
    made.table = made.table.with_metrics("loss_test", test)
    made.save_pretrained(tmp_path / "whole")
    load(tmp_path / "whole", stitch_id=2).save_pretrained(tmp_path / "part")
    made.save_pretrained(tmp_path / "published", stitches="published")
    for name in ("whole", "part", "published"):
        assert main(["bundle", "verify", "--no-anchors", str(tmp_path / name)]) == 0, capsys.readouterr().err


def test_a_size_that_was_never_evaluated_can_be_saved_and_chosen(made, tmp_path):
    made.table = type(made.table)().with_metrics("loss", {"0[0:3]": 2.0, "1[0:5]": 1.0})
    made.save_pretrained(tmp_path / "bundle")
    part = load(tmp_path / "bundle", stitch_id=3)
    assert [stitch.key for stitch in part.published] == [made.keys[3]]
    part.generate(IDS, budget=10**9, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"budget '9' is too small: the smallest of the 1 loaded sizes is stitch 3"):
        part.generate(IDS, budget=9, max_new_tokens=1)
    part.save_pretrained(tmp_path / "part")
    assert_equal(load(tmp_path / "part"), made, part.keys)


def sharded(folders, target):
    """Copies of the anchors in many small shards."""
    for number, folder in enumerate(folders):
        LlamaForCausalLM.from_pretrained(folder).save_pretrained(target / str(number), max_shard_size="20KB")
    return [str(target / str(number)) for number in range(len(folders))]


def test_one_size_opens_only_the_shards_it_needs(anchors, tmp_path):
    folders = sharded(anchors["unequal"], tmp_path)
    whole = fresh(folders, PSTConfig(rank=2))
    whole.save_pretrained(tmp_path / "bundle")
    assert_equal(load(tmp_path / "bundle"), whole)
    stitch = whole.space["0[0:2]>1[4:5]"]
    needed = {0: ("embed_tokens", "layers.0.", "layers.1."), 1: ("layers.4.", "model.norm", "lm_head")}
    removed = 0
    for number, parts in needed.items():
        index = json.loads((tmp_path / str(number) / "model.safetensors.index.json").read_text())["weight_map"]
        kept = {shard for name, shard in index.items() if any(part in name for part in parts)}
        for shard in set(index.values()) - kept:
            (tmp_path / str(number) / shard).unlink()
            removed += 1
    assert removed > 3
    part = load(tmp_path / "bundle", stitch_id=stitch.key)
    assert torch.equal(logits(part), logits(whole, stitch.key))
    with pytest.raises((ValueError, OSError), match="anchor|shard|safetensors"):
        load(tmp_path / "bundle")


def test_a_folder_saved_in_shards_and_then_in_one_file_is_read_from_the_file(anchors, tmp_path):
    folders = sharded(anchors["unequal"], tmp_path)
    large = LlamaForCausalLM.from_pretrained(folders[1])
    with torch.no_grad():
        large.model.layers[4].mlp.up_proj.weight.mul_(2)
    large.save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / WEIGHTS, folders[1])  # as a download of both has it
    whole = fresh(folders)
    whole.save_pretrained(tmp_path / "bundle")
    assert torch.equal(whole.anchors[1](IDS).logits, large(IDS).logits)
    assert torch.equal(logits(load(tmp_path / "bundle", stitch_id=3)), logits(whole, whole.keys[3]))


def test_published_stitches_alone(made, tmp_path):
    made.save_pretrained(tmp_path / "all")
    made.save_pretrained(tmp_path / "published", stitches="published")
    keys = [made.keys[number] for number in (0, 2, len(made.keys) - 1)]
    again = load(tmp_path / "published")
    assert again.keys == keys
    assert [s.stitch_id for s in again.published] == [0, 2, len(made.keys) - 1]
    assert_equal(again, made, keys)
    assert set(tensors(tmp_path / "published")) < set(tensors(tmp_path / "all"))
    again.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "published")
    with pytest.raises(ValueError, match="'some' is unknown"):
        made.save_pretrained(tmp_path / "some", stitches="some")


def test_stitching_layers_in_8_bits(made, tmp_path):
    made.save_pretrained(tmp_path / "full")
    made.save_pretrained(tmp_path / "int8", stitching_dtype="int8")
    made.save_pretrained(tmp_path / "full again")
    assert contents(tmp_path / "full again") == contents(tmp_path / "full"), "one save decides nothing for the next"
    found = tensors(tmp_path / "int8")
    matrices = [name for name in found if name.startswith("stitching_layers") and name.endswith("proj.weight")]
    assert len(matrices) == len(made.space.stitching_layers)
    assert all(found[name].dtype == torch.int8 for name in matrices)
    again = load(tmp_path / "int8")
    for key in made.keys:
        one, other = logits(again, key), logits(made, key)
        assert torch.nn.functional.cosine_similarity(one, other, dim=-1).min() > 0.99, key
        assert torch.equal(one, other) == ("[" in key and ">" not in key), key
    again.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "int8")
    again.save_pretrained(tmp_path / "floats", stitching_dtype=None)
    assert all(t.is_floating_point() for t in tensors(tmp_path / "floats").values())
    assert "stitching_dtype" in inspect.signature(made.save_pretrained).parameters
    assert torch.equal(logits(load(tmp_path / "int8", stitch_id=3)), logits(again, again.keys[3]))
    with pytest.raises(ValueError, match="'int4' is unknown"):
        made.save_pretrained(tmp_path / "x", stitching_dtype="int4")


@pytest.mark.parametrize("stitching_dtype", [None, "int8"])
def test_a_bundle_for_inference_is_small_and_near(stitching_dtype, made, tmp_path):
    made.save_pretrained(tmp_path / "all")
    how = {"for_inference": True, "stitching_dtype": stitching_dtype}
    made.save_pretrained(tmp_path / "use", **how)
    again = load(tmp_path / "use")
    assert again.keys == [made.keys[number] for number in (0, 2, len(made.keys) - 1)]
    assert [s.stitch_id for s in again.published] == [0, 2, len(made.keys) - 1]
    found = tensors(tmp_path / "use")
    assert not any("stitching_layers" in name and "lora_" in name for name in found)
    wide = {name for name, t in found.items() if t.dtype == torch.float32}
    assert wide == {name for name in found if name.endswith("_scale")}
    assert (tmp_path / "use" / WEIGHTS).stat().st_size < 0.5 * (tmp_path / "all" / WEIGHTS).stat().st_size
    for key in again.keys:
        near = torch.nn.functional.cosine_similarity(logits(again, key), logits(made, key), dim=-1).min()
        assert 0.99 < near, key
        assert not torch.equal(logits(again, key), logits(made, key)), key
    part = load(tmp_path / "use", stitch_id=2, merge=True)
    torch.testing.assert_close(logits(part), logits(again, part.keys[0]), atol=1e-4, rtol=1e-4)
    text = (tmp_path / "use" / CARD).read_text()
    assert "Saved for use, in " in text
    assert "Saved for use" not in (tmp_path / "all" / CARD).read_text()
    assert main(["bundle", "verify", str(tmp_path / "use")]) == 0
    made.save_pretrained(tmp_path / "all of them", stitches="all", **how)
    assert load(tmp_path / "all of them").keys == made.keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e9])
def test_8_bit_rows_are_close_and_stable(scale, dtype):
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * scale
    weight[3] = 0
    weight[4, 0] = 127 * scale
    rows, scales = quantize_rows(weight)
    read = dequantize_rows(rows, scales).to(dtype)
    assert ((read.float() - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 + 1e-37).all()
    again, again_scales = quantize_rows(read)
    assert torch.equal(dequantize_rows(again, again_scales), read.float())
    assert torch.equal(again, rows)


def test_every_single_size_loads_in_8_bits(bundle):
    settings = BitsAndBytesConfig(load_in_8bit=True)
    whole = load(bundle, quantization_config=settings)
    for stitch in whole.space:
        part = load(bundle, quantization_config=settings, stitch_id=stitch.stitch_id)
        torch.testing.assert_close(logits(part), logits(whole, stitch.key))


def test_one_size_is_asked_for_in_one_way(bundle):
    with pytest.raises(ValueError, match="stitch_id 1 and budget '1M' both given"):
        load(bundle, stitch_id=1, budget="1M")


def test_anchors_given_as_objects_are_checked_as_their_files_are(made, bundle, anchors):
    for dtype in (torch.float32, torch.bfloat16):
        given = [LlamaForCausalLM.from_pretrained(path, dtype=dtype) for path in anchors["unequal"]]
        found = load(bundle, anchors=given)
        if dtype == torch.float32:
            assert_equal(found, made)
    changed = [LlamaForCausalLM.from_pretrained(path) for path in anchors["unequal"]]
    changed[1].model.norm.weight.data[0] += 1
    with pytest.raises(ValueError, match="anchor 1 changed: model.norm.weight"):
        load(bundle, anchors=changed)
