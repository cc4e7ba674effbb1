"""Bundles: what comes back, byte for byte, whole or for one size, and what of the anchors is in them (nothing)."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, fresh, ids_like, randomise, spread
from image_anchors import FAMILIES as IMAGE_FAMILIES
from image_anchors import build, vit
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
)

from stitched_llama import PSTConfig, StitchedLlamaForCausalLM, StitchedViTForImageClassification
from stitched_llama.bundles import CARD, CONFIG, DIGESTS, GENERATION, TABLE, WEIGHTS
from stitched_llama.cli import main
from stitched_llama.training import pico_anchor

FILES = {CONFIG, WEIGHTS, TABLE, CARD, GENERATION, DIGESTS}
IDS = ids_like(2, 11)
load = StitchedLlamaForCausalLM.from_pretrained


@torch.no_grad()
def logits(model, key=None):
    return model(IDS, stitch_id=key).logits


def assert_equal(one, other, keys=None):
    for key in keys or one.keys:
        assert torch.equal(logits(one, key), logits(other, key)), key


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def tensors(folder):
    with safe_open(Path(folder) / WEIGHTS, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stitch_reloads_and_is_saved_again_as_the_same_bytes(family, stitched, tmp_path, tokenizer):
    model = stitched(family, pst=True)
    model.save_pretrained(tmp_path / "one")
    assert set(contents(tmp_path / "one")) == FILES
    tokenizer.save_pretrained(tmp_path / "one")
    for number, loader in enumerate((StitchedLlamaForCausalLM, AutoModelForCausalLM)):
        again = loader.from_pretrained(tmp_path / "one")
        assert type(again) is StitchedLlamaForCausalLM
        assert not again.training
        assert again.table == model.table
        assert_equal(again, model)
        again.save_pretrained(tmp_path / f"again{number}")
        for name, raw in contents(tmp_path / f"again{number}").items():
            assert raw == (tmp_path / "one" / name).read_bytes(), name
    assert again.trainable_parameters() == model.trainable_parameters()
    assert AutoConfig.from_pretrained(tmp_path / "one").stitch_space().digest == model.space.digest
    assert AutoTokenizer.from_pretrained(tmp_path / "one").get_vocab() == tokenizer.get_vocab()


def test_before_pst_too(anchors, tmp_path):
    model = fresh(anchors["unequal"])
    model.save_pretrained(tmp_path)
    assert_equal(load(tmp_path), model)
    assert all(name.startswith("stitching_layers.") for name in tensors(tmp_path))


def test_nothing_of_the_anchors_is_in_it(made, bundle):
    found = tensors(bundle)
    stitching = sum(layer.params for layer in made.space.stitching_layers.values())
    assert sum(t.numel() for t in found.values()) == stitching + sum(made.trainable_parameters().values())
    owners = {name.split(".")[0] for name in found}
    assert owners == {"anchors", "stitching_layers", "stitch_bias"}
    assert all("lora_" in name for name in found if name.startswith("anchors."))
    assert not any(".default." in name or "base_layer" in name for name in found)
    assert not [path for path in bundle.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".py")]
    assert json.loads((bundle / CONFIG).read_text())["anchors"][0]["name_or_path"].endswith("unequal0")


def test_anchors_may_be_objects(anchors, tmp_path):
    objects = [LlamaForCausalLM.from_pretrained(folder) for folder in anchors["unequal"]]
    model = fresh(objects, PSTConfig(rank=2))
    model.save_pretrained(tmp_path / "known")  # they still equal their files
    assert_equal(load(tmp_path / "known"), model)

    def nameless():
        return [spread(pico_anchor(*shape, vocab_size=260)) for shape in ((32, 3, 4, 2), (48, 5, 6, 3))]

    model = fresh(nameless(), PSTConfig(rank=2))
    model.save_pretrained(tmp_path / "nameless")
    with pytest.raises(ValueError, match=r"does not know where anchor 0 lies: pass anchors="):
        load(tmp_path / "nameless")
    with pytest.raises(ValueError, match="1 anchors given, the bundle has 2"):
        load(tmp_path / "nameless", anchors=nameless()[:1])
    assert_equal(load(tmp_path / "nameless", anchors=nameless()), model)
    changed = nameless()
    with torch.no_grad():
        changed[1].model.layers[2].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="anchor 1 changed: model.layers.2 "):
        load(tmp_path / "nameless", anchors=changed)


def test_an_object_that_was_changed_is_not_taken_for_its_files(anchors, tmp_path):
    objects = [LlamaForCausalLM.from_pretrained(folder) for folder in anchors["unequal"]]
    with torch.no_grad():
        objects[1].model.layers[3].mlp.up_proj.weight[5, 5] += 1
    plain = copy.deepcopy(objects[1])
    model = fresh(objects, PSTConfig(rank=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not know where anchor 1 lies: pass anchors=\[\.\.\.\]"):
        load(tmp_path)
    assert_equal(load(tmp_path, anchors=[LlamaForCausalLM.from_pretrained(anchors["unequal"][0]), plain]), model)


@pytest.mark.parametrize("part", ["attention.q_proj.weight", "running_mean"])
def test_an_image_object_that_was_changed_is_not_taken_for_its_files(part, tmp_path):
    """A ViT's files name their tensors otherwise than its memory does; running statistics are no parameters."""
    family = "resnet" if part == "running_mean" else "vit"
    stitched_class, _, options = IMAGE_FAMILIES[family]
    for number, anchor in enumerate(build(family)):
        anchor.save_pretrained(tmp_path / str(number))

    def objects(change):
        found = [AutoModelForImageClassification.from_pretrained(tmp_path / str(n)) for n in range(2)]
        found[1].state_dict()[next(name for name in found[1].state_dict() if name.endswith(part))].add_(change)
        return found

    def stitch(change):
        torch.manual_seed(0)
        model = stitched_class.from_anchors(objects(change), **options)
        model.save_pretrained(tmp_path / "b")
        return model

    stitch(0)
    stitched_class.from_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="anchor 1 changed"):
        stitched_class.from_pretrained(tmp_path / "b", anchors=objects(1))
    changed = stitch(1)
    with pytest.raises(ValueError, match="does not know where anchor 1 lies"):
        stitched_class.from_pretrained(tmp_path / "b")
    again = stitched_class.from_pretrained(tmp_path / "b", anchors=objects(1))
    pixels = torch.randn(2, 3, changed.config.image_size, changed.config.image_size)
    assert all(torch.equal(again(pixels, stitch_id=k).logits, changed(pixels, stitch_id=k).logits) for k in again.keys)
    with pytest.raises(ValueError, match="anchor 1 changed"):
        stitched_class.from_pretrained(tmp_path / "b", anchors=objects(0))


def test_an_object_that_carries_something_is_refused(anchors, bundle):
    from peft import LoraConfig

    objects = [LlamaForCausalLM.from_pretrained(folder) for folder in anchors["unequal"]]
    first = fresh(objects, PSTConfig(rank=0))  # the stitch bias alone
    before = logits(first)
    for again in (lambda: StitchedLlamaForCausalLM.from_anchors(objects), lambda: load(bundle, anchors=objects)):
        with pytest.raises(ValueError, match="anchor 0, a LlamaForCausalLM .* carries LoRA or another .* load it anew"):
            again()
    assert torch.equal(logits(first), before)
    objects = [LlamaForCausalLM.from_pretrained(folder) for folder in anchors["unequal"]]
    objects[1].add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="anchor 1, .* carries LoRA"):
        StitchedLlamaForCausalLM.from_anchors(objects)


@pytest.mark.parametrize(
    "option",
    [{"dtype": torch.bfloat16}, {"attn_implementation": "eager"}, {"device_map": "cpu"}, {"quantization_config": {}}],
)
def test_options_of_loading_are_refused_for_objects(option, made, bundle, anchors):
    objects = [anchors["unequal"][0], LlamaForCausalLM.from_pretrained(anchors["unequal"][1])]
    named = f"{next(iter(option))} shape anchors as they are loaded, anchor 1 is a model already: name folders or Hub"
    for stitch in (StitchedLlamaForCausalLM.from_anchors, lambda given, **how: load(bundle, anchors=given, **how)):
        with pytest.raises(ValueError, match=named):
            stitch(objects, **option)
    assert_equal(AutoModelForCausalLM.from_pretrained(bundle, anchors=objects), made)


def test_the_configuration_of_an_anchor_is_the_bundles(anchors, tmp_path):
    """Of files whose config.json says otherwise now, whole and in part."""
    own = [shutil.copytree(folder, tmp_path / str(n)) for n, folder in enumerate(anchors["unequal"])]
    model = fresh([str(folder) for folder in own], PSTConfig(rank=2))
    model.save_pretrained(tmp_path / "b")
    changed = json.loads((own[1] / "config.json").read_text())
    changed["rope_parameters"]["rope_theta"] = 100.0
    (own[1] / "config.json").write_text(json.dumps(changed))
    assert_equal(load(tmp_path / "b"), model)
    assert torch.equal(logits(load(tmp_path / "b", stitch_id=2)), logits(model, 2))


def test_special_tokens_are_the_bundles(made, tmp_path):
    assert made.config.pad_token_id == made.anchors[-1].config.pad_token_id
    for changed in ({"pad_token_id": 7, "eos_token_id": [2, 9]}, {"pad_token_id": None, "bos_token_id": None}):
        for name, value in changed.items():
            setattr(made.config, name, value)
        made.save_pretrained(tmp_path / "b")
        again = load(tmp_path / "b").config
        assert {name: getattr(again, name) for name in changed} == changed


def test_anchors_that_are_stored_in_8_bits(anchors, tmp_path):
    settings = BitsAndBytesConfig(load_in_8bit=True)
    folders = [str(tmp_path / str(n)) for n in range(2)]
    for folder, source in zip(folders, anchors["unequal"]):
        LlamaForCausalLM.from_pretrained(source, quantization_config=settings).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    model = fresh(folders, PSTConfig(rank=2))
    model.save_pretrained(tmp_path / "b")
    whole = load(tmp_path / "b")
    assert_equal(whole, model)
    for stitch in model.space:
        part = load(tmp_path / "b", stitch_id=stitch.stitch_id)
        assert torch.equal(logits(part), logits(model, stitch.key)), stitch.key
    older = json.loads((tmp_path / "b" / CONFIG).read_text())
    for settings_of in older["anchor_configs"]:  # as a bundle once was: it did not say
        assert settings_of.pop("quantization_config")
    for reference in older["anchors"]:
        assert reference.pop("digests")
    shutil.copytree(tmp_path / "b", tmp_path / "older")
    (tmp_path / "older" / CONFIG).write_text(json.dumps(older))
    assert_equal(load(tmp_path / "older", verify=False), model)
    budget = f"{whole.space.anchor_stitch(-1).weight_bytes / 1000}kB"
    assert load(tmp_path / "b", budget=budget).keys == [whole.choose(budget).key] == ["1[0:5]"]
    objects = [LlamaForCausalLM.from_pretrained(source, quantization_config=settings) for source in anchors["unequal"]]
    fresh(objects).save_pretrained(tmp_path / "full")  # quantised by loading, not in their files
    assert "quantization_config" not in load(tmp_path / "full").config.anchor_configs[0]


@pytest.mark.filterwarnings("ignore:.*device_map keys do not match")  # one map for anchors of two depths
def test_what_is_offloaded_is_refused(anchors, bundle, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{n}": "disk" if n == 2 else "cpu" for n in range(5)}
    with pytest.raises(ValueError, match="device_map put a part of .* load one size"):
        load(bundle, device_map=places, offload_folder=str(tmp_path / "off"))
    large = LlamaForCausalLM.from_pretrained(
        anchors["unequal"][1], device_map=places, offload_folder=str(tmp_path / "off2")
    )
    with pytest.raises(ValueError, match="device_map put a part of anchor 1 on"):
        StitchedLlamaForCausalLM.from_anchors([LlamaForCausalLM.from_pretrained(anchors["unequal"][0]), large])


@pytest.mark.parametrize("loader", [StitchedLlamaForCausalLM, AutoModelForCausalLM])
def test_anchors_may_lie_elsewhere(loader, made, bundle, anchors, tmp_path):
    moved = [str(shutil.copytree(folder, tmp_path / f"moved{n}")) for n, folder in enumerate(anchors["unequal"])]
    content = json.loads((bundle / CONFIG).read_text())
    for anchor in content["anchors"]:
        anchor["name_or_path"] = str(tmp_path / "gone")
    (bundle / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="config.json changed.*bundle digest"):
        loader.from_pretrained(bundle)
    with pytest.raises(OSError, match="anchor 0 of the bundle, .*gone"):
        loader.from_pretrained(bundle, verify=False)
    assert main(["bundle", "digest", str(bundle)]) == 0
    assert_equal(loader.from_pretrained(bundle, anchors=moved), made)


@pytest.mark.parametrize("loader", [StitchedLlamaForCausalLM, AutoModelForCausalLM])
def test_options_of_loading_reach_the_anchors(loader, made, bundle):
    again = loader.from_pretrained(bundle, dtype=torch.bfloat16, attn_implementation="eager", default_stitch_id=0)
    assert {p.dtype for p in again.anchors.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {anchor.config._attn_implementation for anchor in again.anchors} == {"eager"}
    assert torch.equal(logits(again), logits(again, "0[0:3]"))
    assert again.space[0].weight_bytes == 2 * again.space[0].params


def test_the_card_names_anchors_and_published_sizes(made, bundle):
    card = (bundle / CARD).read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "unequal0" in card
    rows = [line for line in card.splitlines() if line.startswith("| ") and "`" in line]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["0", "2", "5"]


def test_command_shows_and_verifies(made, bundle, capsys):
    assert main(["bundle", "show", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert all(key in shown for key in made.keys)
    assert "unequal1" in shown
    assert shown.count("yes") == 3
    assert main(["bundle", "show", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["space_digest"] == made.space.digest
    assert main(["bundle", "verify", str(bundle)]) == 0
    assert "all tensors of 6 stitches there" in capsys.readouterr().out
    raw = bytearray((bundle / WEIGHTS).read_bytes())
    raw[-3] ^= 1
    (bundle / WEIGHTS).write_bytes(raw)
    assert main(["bundle", "verify", str(bundle), "--no-anchors"]) == 2
    assert "SHA-256" in capsys.readouterr().err
    assert main(["bundle", "show", str(bundle / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_loading_changes_nothing_on_disk(made, bundle):
    before = contents(bundle)
    load(bundle)
    load(bundle, stitch_id=1)
    assert contents(bundle) == before
    randomise(made, 1).save_pretrained(bundle)
    assert contents(bundle)[WEIGHTS] != before[WEIGHTS]


def test_saving_forwards_what_concerns_the_hub_and_refuses_the_rest(made, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(type(made), "push_to_hub", lambda self, repo_id, **how: seen.update(repo_id=repo_id, **how))
    made.save_pretrained(
        tmp_path / "b",
        push_to_hub=True,
        repo_id="me/x",
        commit_message="m",
        stitches="published",
        stitching_dtype="int8",
    )
    assert seen == {"repo_id": "me/x", "commit_message": "m", "stitches": "published", "stitching_dtype": "int8"}
    with pytest.raises(TypeError, match=r"unknown arguments \['stiches'\]"):
        made.save_pretrained(tmp_path / "b", stiches="published")
    made.save_pretrained(tmp_path / "c", is_main_process=True, save_function=torch.save)  # as Accelerate's guide has it


def test_anchors_in_the_wrong_order_are_named_before_their_weights_are_read(bundle, anchors):
    for how in ({}, {"stitch_id": 4}):
        with pytest.raises(
            ValueError, match="anchor 0 is .*unequal1, a llama of 5 blocks, 48 wide; .* of 3 blocks, 32 wide"
        ):
            load(bundle, anchors=anchors["unequal"][::-1], **how)


def test_what_is_no_anchor_and_no_bundle_of_the_class_is_named(bundle, anchors, tmp_path):
    for source in (tmp_path / "none", tmp_path):
        with pytest.raises(OSError, match=f"anchor '{source}' is neither a folder here with a config.json nor"):
            StitchedLlamaForCausalLM.from_anchors([str(source), anchors["unequal"][1]])
    with pytest.raises(
        ValueError, match="is a bundle of stitched_llama, StitchedViTForImageClassification loads stitched_vit"
    ):
        StitchedViTForImageClassification.from_pretrained(bundle)
    for number, width in enumerate((16, 24)):
        vit(width, 3).save_pretrained(tmp_path / str(number))
    with pytest.raises(ValueError, match="anchor 0 is a vit, which reads pixel_values; StitchedLlamaForCausalLM reads"):
        StitchedLlamaForCausalLM.from_anchors([str(tmp_path / "0"), str(tmp_path / "1")])
    with pytest.raises(ValueError, match="anchor 0 is a llama, which reads input_ids; StitchedViT"):
        StitchedViTForImageClassification.from_anchors(anchors["unequal"])


def test_saving_over_an_anchor_is_refused(anchors, tmp_path):
    own = [str(shutil.copytree(folder, tmp_path / str(n))) for n, folder in enumerate(anchors["unequal"])]
    before = contents(own[1])
    with pytest.raises(ValueError, match=f"{own[1]} is the folder of an anchor"):
        fresh(own).save_pretrained(own[1])
    assert contents(own[1]) == before
    fresh(anchors["unequal"]).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match=f"{own[1]} is the folder of an anchor"):
        load(tmp_path / "b", anchors=own).save_pretrained(own[1])


def test_options_that_evaluation_harnesses_pass_are_taken(made, bundle):
    again = AutoModelForCausalLM.from_pretrained(
        bundle, gguf_file=None, subfolder="", use_kernels=False, revision="main"
    )
    assert_equal(again, made, made.keys[:1])
    with pytest.raises(TypeError, match="unknown argument 'subfolder'"):
        load(bundle, subfolder="deep")
    with pytest.raises(TypeError, match="unknown argument 'stitch_ids'"):
        load(bundle, stitch_ids=0)
