"""Models that have no anchors to name: built from a configuration, saved whole, loaded whole or in part."""

import json

import pytest
import torch
from conftest import FAMILIES, fresh, randomise, spread, with_table
from image_anchors import FAMILIES as IMAGE_FAMILIES
from image_anchors import tuned
from safetensors.torch import load_file, save_file
from test_bundle import IDS, assert_equal, contents, load, logits
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from stitched_llama import PSTConfig, StitchedLlamaConfig, StitchedLlamaForCausalLM
from stitched_llama.bundles import CARD, CONFIG, WEIGHTS, Bundle
from stitched_llama.cli import main
from stitched_llama.training import pico_anchor


def built(anchors, family="unequal", pst=None):
    config = StitchedLlamaConfig.from_anchor_configs(anchors[family], **FAMILIES[family][1])
    model = spread(StitchedLlamaForCausalLM(config)).eval()
    if pst is not None:
        model.attach_pst(pst)
        randomise(model)
    return model


@pytest.mark.parametrize("pst", [None, PSTConfig(rank=2), PSTConfig(full=True)], ids=["bare", "pst", "full"])
def test_a_model_built_from_a_config_is_saved_and_loaded_whole(pst, anchors, tmp_path, capsys):
    model = with_table(built(anchors, pst=pst))
    model.save_pretrained(tmp_path / "one")
    for loader in (load, AutoModelForCausalLM.from_pretrained):
        again = loader(tmp_path / "one")
        assert again.table == model.table
        assert_equal(again, model)
        again.save_pretrained(tmp_path / "again")
        assert contents(tmp_path / "again") == contents(tmp_path / "one")
    assert "with all their weights" in (tmp_path / "one" / CARD).read_text()
    assert main(["bundle", "verify", str(tmp_path / "one")]) == 0
    for stitch in model.space:
        part = load(tmp_path / "one", stitch_id=stitch.key)
        assert torch.equal(logits(part), logits(model, stitch.key))
        part.save_pretrained(tmp_path / f"part{stitch.stitch_id}")
        again = load(tmp_path / f"part{stitch.stitch_id}")
        assert again.keys == [stitch.key]
        assert torch.equal(logits(again), logits(model, stitch.key))
    if pst is None:
        sizes = [
            sum(t.numel() for t in load_file(tmp_path / f"part{s.stitch_id}" / WEIGHTS).values()) for s in model.space
        ]
        assert sizes == [stitch.params for stitch in model.space]


def test_published_sizes_and_checkpoints(anchors, tmp_path, capsys):
    model, other = (with_table(built(anchors, pst=PSTConfig(rank=2))) for _ in range(2))
    randomise(model, 5)
    model.save_pretrained(tmp_path / "published", stitches="published")
    again = load(tmp_path / "published")
    assert len(again.keys) == 3
    assert_equal(again, model, again.keys)
    assert main(["bundle", "show", str(tmp_path / "published")]) == 0
    assert "the weights of its anchors are in it" in capsys.readouterr().out
    model.save_pretrained(tmp_path / "all")
    assert other.load_state_dict(load_file(tmp_path / "all" / WEIGHTS)) == ([], [])  # as a Trainer that resumes
    assert_equal(other, model)


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_dtype_stays(dtype, anchors, tmp_path):
    model = built(anchors, pst=PSTConfig(rank=2)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, **({} if dtype is None else {"dtype": dtype}))
    assert {anchor.dtype for anchor in again.anchors} == {torch.bfloat16}
    for key in model.keys:
        torch.testing.assert_close(logits(again, key), logits(model, key), atol=1.0, rtol=0.1)  # PST was rounded
    assert load(tmp_path, dtype="float32").anchors[0].dtype == torch.float32


def test_a_merged_model_is_saved_whole(anchors, tmp_path):
    model = built(anchors, pst=PSTConfig(rank=2))
    model.merge_pst()
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.pst == PSTConfig(rank=0, stitching_rank=0).to_dict()
    assert_equal(again, model)


def test_weights_that_anchors_share_are_saved_once(tmp_path):
    large = spread(pico_anchor(32, 5, 4, 2, vocab_size=260, tie_word_embeddings=True))
    small = pico_anchor(32, 3, 4, 2, vocab_size=260, tie_word_embeddings=True)
    spread(small, 1)
    small.get_input_embeddings().weight.data.copy_(large.get_input_embeddings().weight)
    shared = {"name_or_path": "large", "revision": None, "depth": 5, "target_blocks": [1, 3, 4]}
    small.config.shrunk_from = {**shared, "shared": ["embedding", "head"]}
    model = fresh([small, large], junctions="aligned")
    model.config.anchors = None
    model.save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / WEIGHTS)
    names = tensors.keys()
    assert [name for name in names if "embed_tokens" in name or "lm_head" in name] == [
        "anchors.0.model.embed_tokens.weight"
    ]
    again = load(tmp_path / "whole")
    assert_equal(again, model)
    assert again.anchors[0].get_input_embeddings().weight is again.anchors[1].get_output_embeddings().weight
    for stitch in model.space:
        part = load(tmp_path / "whole", stitch_id=stitch.key)
        assert torch.equal(logits(part), logits(model, stitch.key)), stitch.key
        part.save_pretrained(tmp_path / "part")
        assert torch.equal(logits(load(tmp_path / "part")), logits(model, stitch.key)), stitch.key
    del tensors["anchors.1.model.layers.0.mlp.up_proj.weight"]  # that of anchor 0 has the same shape
    save_file(tensors, tmp_path / "whole" / WEIGHTS)
    with pytest.raises(ValueError, match="lacks 1 of .* of anchor 1, the first is model.layers.0.mlp.up_proj.weight"):
        load(tmp_path / "whole", verify=False)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_images_too(family, tmp_path):
    model = tuned(family)
    model.config.anchors = None
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, *[model.config.image_size] * 2)
    for part in ({}, {"stitch_id": len(model.space) // 2}):
        again = type(model).from_pretrained(tmp_path, **part)
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())
        with torch.no_grad():
            for key in again.keys:
                torch.testing.assert_close(again(pixels, stitch_id=key).logits, model(pixels, stitch_id=key).logits)


def test_the_config_of_a_bundle_makes_a_model_of_its_own(made, bundle, tmp_path):
    """Its weights are random: they must not be taken for those of the anchors that the config names."""
    config = AutoConfig.from_pretrained(bundle)
    model = AutoModelForCausalLM.from_config(config)
    assert model.config.anchors is None
    assert config.anchors
    assert model.trainable_parameters() == made.trainable_parameters()
    model.save_pretrained(tmp_path / "random")
    assert_equal(load(tmp_path / "random"), model)
    with pytest.raises(ValueError, match="anchors are given, and the bundle names no anchors"):
        load(tmp_path / "random", anchors=["a", "b"])


def test_what_transformers_asks_of_any_model(anchors, tmp_path):
    config = StitchedLlamaConfig.from_anchor_configs(anchors["unequal"])
    model = StitchedLlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    assert len(model(IDS, output_attentions=True).attentions) == 5
    model.save_pretrained(tmp_path)
    again, info = load(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values())
    assert_equal(again, model)
    with pytest.raises(ValueError, match="needs the folder or Hub id of a bundle"):
        load(None)


def test_damage_is_named(made, bundle, anchors, tmp_path):
    fields = json.loads((bundle / CONFIG).read_text())
    (bundle / CONFIG).write_text(json.dumps(fields | {"anchors": None}))
    with pytest.raises(ValueError, match="names no anchors, so that it holds their weights, and lacks .* of anchor 0"):
        load(bundle, verify=False)
    built(anchors).save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / WEIGHTS)
    name = "anchors.1.model.layers.2.self_attn.q_proj.weight"
    for change, said in (
        (
            tensors | {name: tensors[name][:4].clone()},
            f"tensor {name} .* has shape .4, 48., its config.json makes it .72, 48.",
        ),
        (
            {n: t for n, t in tensors.items() if n != name},
            "lacks 1 of 48 tensors of anchor 1, the first is model.layers.2",
        ),
        (tensors | {"anchors.1.model.more": torch.ones(2)}, "holds 1 tensors that its config.json has no place for"),
        (tensors | {name: tensors[name] * torch.nan}, "entries that are NaN"),
    ):
        save_file(change, tmp_path / "whole" / WEIGHTS)
        with pytest.raises(ValueError, match=said):
            load(tmp_path / "whole", verify=False)


def test_quantised_weights_are_loaded_and_not_saved(anchors, tmp_path):
    model = built(anchors, pst=PSTConfig(rank=2))
    model.save_pretrained(tmp_path / "whole")
    eight = load(tmp_path / "whole", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert eight.anchors[0].is_loaded_in_8bit
    for key in model.keys:
        assert torch.nn.functional.cosine_similarity(logits(eight, key), logits(model, key), dim=-1).mean() > 0.5
    with pytest.raises(ValueError, match="the anchors of this model are quantised"):
        eight.save_pretrained(tmp_path / "eight")
    assert torch.equal(logits(eight), eight(IDS).logits.detach())
    assert Bundle.open(tmp_path / "whole").config["anchors"] is None
