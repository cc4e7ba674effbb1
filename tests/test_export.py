"""One size as a model of its own: plain models load without this package, stitched ones without anchors, all with equal logits."""

import copy
import json
import shutil

import pytest
import torch
from conftest import fresh, ids_like, python, spread, with_table
from image_anchors import tuned
from safetensors.torch import load_file, save_file
from shapes import config
from test_bundle import contents, load
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from stitched_llama import PSTConfig
from stitched_llama.bundles import CARD, CONFIG, WEIGHTS
from stitched_llama.cli import main

IDS = ids_like(2, 9, seed=3)
PST = {"paper": PSTConfig(rank=2), "own LoRA": PSTConfig(rank=2, stitch_rank=3), "none": None}


@torch.no_grad()
def logits(model, **how):
    return model(IDS, **how).logits


def assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


def assert_plain(folder, wanted):
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert_close(logits(plain), wanted)
    return plain


def pair(tmp_path, tokenizer, families=("llama", "llama"), depths=(3, 5), fields=({}, {})):
    """Folders of two equally wide anchors."""
    for number, (family, depth, own) in enumerate(zip(families, depths, fields)):
        shape = config(family, 32, depth, 4, 64, **{"vocab": len(tokenizer), "num_key_value_heads": 2, **own})
        folder = tmp_path / f"anchor{number}"
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape)
        )
        spread(model, number).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return [str(tmp_path / f"anchor{number}") for number in range(len(families))]


FLAT = {"sliding_window": None}
ROUTES = ["0[0:2]>1[3:5]", "1[0:1]>0[1:2]>1[3:5]"]


BLOCKS = {  # families of both anchors, further fields, the class of a small anchor, of a large one, of what has biases
    "llama": (("llama", "llama"), ({}, {"attention_bias": True, "mlp_bias": True}), "LLL"),
    "mistral": (("mistral", "mistral"), (FLAT, FLAT), "MML"),
    "qwen2": (("qwen2", "qwen2"), ({}, {}), "QQL"),
    "qwen3": (("qwen3", "qwen3"), ({"head_dim": 12}, {"head_dim": 12}), "333"),
    "two families": (("llama", "mistral"), ({}, FLAT), "LML"),
}
PAIRS = [
    *((kind, "paper") for kind in BLOCKS),
    ("llama", "own LoRA"),
    ("two families", "own LoRA"),
    ("mistral", "none"),
    ("qwen2", "none"),
]


@pytest.mark.parametrize(("kind", "named"), PAIRS)
def test_anchors_and_identity_stitches_are_plain_models(kind, named, tmp_path, tokenizer):
    (families, fields, kinds), settings = BLOCKS[kind], PST[named]
    folders = pair(tmp_path, tokenizer, families, fields=fields)
    model = fresh(folders, settings, routes=ROUTES, adapter="identity")
    names = {"L": "Llama", "M": "Mistral", "Q": "Qwen2", "3": "Qwen3"}
    for stitch in model.space:
        done = model.export(tmp_path / str(stitch.stitch_id), stitch_id=stitch.key)
        assert done.not_plain is None
        plain = assert_plain(done.folder, logits(model, stitch_id=stitch.key))
        biased = settings is not None and not (stitch.is_anchor and settings.stitch_rank)
        known = kinds[2] if biased or not stitch.is_anchor else kinds[stitch.segments[0].anchor]
        if not biased and families[0] == families[1]:
            known = kinds[0]
        assert type(plain).__name__ == done.architecture == f"{names[known]}ForCausalLM"
        how = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(plain.generate(IDS, **how), model.generate(IDS, stitch_id=stitch.key, **how))
        assert AutoTokenizer.from_pretrained(done.folder).get_vocab() == tokenizer.get_vocab()
    text = (done.folder / CARD).read_text()
    assert stitch.key in text
    assert "loads it without `stitched_llama`" in text


def test_it_loads_in_a_process_without_this_package(tmp_path, tokenizer):
    model = with_table(fresh(pair(tmp_path, tokenizer), PST["paper"], routes=ROUTES, adapter="identity"))
    model.save_pretrained(tmp_path / "bundle")
    tokenizer.save_pretrained(tmp_path / "bundle")
    out = tmp_path / "out"
    key = ROUTES[0]
    assert main(["export", str(tmp_path / "bundle"), "--stitch-id", key, str(out), "--plain"]) == 0
    save_file({"ids": IDS, "logits": logits(model, stitch_id=key)}, tmp_path / "wanted")
    code = """
import sys
from safetensors.torch import load_file
from transformers import pipeline
sys.modules["stitched_llama"] = None  # an import of it fails
folder, wanted = sys.argv[1], load_file(sys.argv[2])
writer = pipeline("text-generation", model=folder)
print(len(writer("hello", max_new_tokens=3, do_sample=False)[0]["generated_text"]) > 5, type(writer.model).__name__)
print(float((writer.model(wanted["ids"]).logits - wanted["logits"]).abs().max()))
"""
    done = python("-c", code, out, tmp_path / "wanted", cwd=tmp_path, PYTHONPATH="").stdout.split()
    assert done[:2] == ["True", "LlamaForCausalLM"]
    assert float(done[2]) < 1e-4  # logits are some 10
    fields = json.loads((out / CONFIG).read_text())
    assert fields["attention_bias"] is True
    assert fields["num_hidden_layers"] == 4
    assert "auto_map" not in fields
    assert "Measured on the stitch: loss" in (out / CARD).read_text()


@pytest.mark.parametrize("settings", PST.values(), ids=PST)
def test_a_stitch_of_two_widths_is_one_folder_without_anchors(settings, anchors, tmp_path):
    folders = [shutil.copytree(folder, tmp_path / str(n)) for n, folder in enumerate(anchors["unequal"])]
    model = with_table(fresh([str(folder) for folder in folders], settings))
    model.save_pretrained(tmp_path / "bundle")
    stitch = model.space[2]
    wanted = logits(model, stitch_id=stitch.key)
    (tmp_path / "out").mkdir()  # an empty folder may be there
    done = model.export(tmp_path / "out", budget=stitch.params)
    assert not [path.name for path in done.folder.iterdir() if path.name.startswith(".")]
    assert done.stitch == stitch
    assert model.pinned(2).export(tmp_path / "from view").stitch == stitch
    assert done.not_plain.startswith("a stitching layer joins block 1 of anchor 0 to block 3 of anchor 1")
    part = load(tmp_path / "bundle", stitch_id=2, merge=settings is not None)
    part.export(tmp_path / "from part")
    measured = {"loss": {stitch.key: model.table.metrics["loss"][stitch.key]}}
    small = model.export(tmp_path / "anchor", stitch_id=0, plain=False)
    assert "asked for as a stitched model" in small.not_plain
    wanted_small = logits(model, stitch_id=0)
    for folder in folders:
        shutil.rmtree(folder)
    for name in ("out", "from part"):
        again = load(tmp_path / name)
        assert_close(logits(again), wanted)
        assert again.keys == [stitch.key]
        assert again.table.metrics == measured
        assert main(["bundle", "verify", str(tmp_path / name)]) == 0
        biased = sum(
            t.numel() for n, t in load_file(tmp_path / name / WEIGHTS).items() if not n.startswith("stitch_bias")
        )
        assert biased == stitch.params
        again.save_pretrained(tmp_path / f"{name} again")
        saved, before = contents(tmp_path / f"{name} again"), contents(tmp_path / name)
        assert all(saved[n] == before[n] for n in (WEIGHTS, CONFIG, "stitched_code.py"))
        how = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(again.generate(IDS, **how), model.generate(IDS, stitch_id=stitch.key, **how))
        assert AutoTokenizer.from_pretrained(tmp_path / name).eos_token_id == 2
    assert_close(logits(load(tmp_path / "anchor")), wanted_small)
    with pytest.raises(ValueError, match="holds 1 of 6|is not in"):
        load(tmp_path / "out", stitch_id=0)
    with pytest.raises(ValueError, match=r"stitch 2 \(.*\) is no plain model: a stitching layer"):
        model.export(tmp_path / "plain", stitch_id=2, plain=True)
    assert main(["export", str(tmp_path / "out"), "--stitch-id", "2", str(tmp_path / "third")]) == 0
    assert_close(logits(load(tmp_path / "third")), wanted)


def test_trust_remote_code_finds_the_classes_where_the_package_is_installed(made, tmp_path):
    made.export(tmp_path / "out", stitch_id=2)
    save_file({"ids": IDS, "logits": logits(made, stitch_id=2)}, tmp_path / "wanted")
    code = """
import sys
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, pipeline
folder, wanted = sys.argv[1], load_file(sys.argv[2])
writer = pipeline("text-generation", model=folder, trust_remote_code=True)
print(len(writer("hello", max_new_tokens=3, do_sample=False)[0]["generated_text"]) > 5, type(writer.model).__name__)
print(float((writer.model(wanted["ids"]).logits - wanted["logits"]).abs().max()))
"""
    where = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = python("-c", code, tmp_path / "out", tmp_path / "wanted", cwd=tmp_path, **where)
    assert done.stdout.split()[:2] == ["True", "StitchedLlamaForCausalLM"]
    assert float(done.stdout.split()[2]) < 1e-4
    known = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # registered: no code is run
    assert_close(logits(known), logits(made, stitch_id=2))


def test_tied_and_shared_embeddings_come_out_right(tmp_path, tokenizer):
    """The small anchor was cut from the large one and keeps its tied embedding."""
    tied = {"tie_word_embeddings": True}
    folders = pair(tmp_path, tokenizer, fields=(tied, tied))
    large, small = (LlamaForCausalLM.from_pretrained(folders[n]) for n in (1, 0))
    small.get_input_embeddings().weight.data.copy_(large.get_input_embeddings().weight)
    small.config.shrunk_from = {
        "name_or_path": "large", "revision": None, "depth": 5, "target_blocks": [1, 3, 4], "shared": ["embedding", "head"],
    }  # fmt: skip
    small.save_pretrained(folders[0])
    model = fresh(folders, PST["paper"], junctions="aligned")
    model.save_pretrained(tmp_path / "bundle")
    for stitch in model.space:
        for whole in (True, False):
            source = model if whole else load(tmp_path / "bundle", stitch_id=stitch.key)
            folder = source.export(tmp_path / f"{stitch.stitch_id}{whole}", stitch_id=stitch.key).folder
            plain = assert_plain(folder, logits(model, stitch_id=stitch.key))
            assert plain.config.tie_word_embeddings
            assert not hasattr(plain.config, "shrunk_from")
            assert [n for n in load_file(folder / WEIGHTS) if "lm_head" in n] == []


def test_embeddings_that_are_tied_in_each_anchor_alone_are_untied_in_a_stitch(tmp_path, tokenizer):
    tied = {"tie_word_embeddings": True}
    model = fresh(pair(tmp_path, tokenizer, fields=(tied, tied)), PST["paper"], routes=ROUTES, adapter="identity")
    for stitch in model.space:
        folder = model.export(tmp_path / str(stitch.stitch_id), stitch_id=stitch.key).folder
        plain = assert_plain(folder, logits(model, stitch_id=stitch.key))
        ends = {stitch.segments[0].anchor, stitch.segments[-1].anchor}
        assert plain.config.tie_word_embeddings == (len(ends) == 1), stitch.key


def test_padded_vocabularies_are_cut_to_what_the_anchors_have_in_common(tmp_path, tokenizer):
    fields = ({"vocab_size": 1000}, {"vocab_size": 1003})
    shapes = [config("llama", 32, depth, 4, 64, **own) for depth, own in zip((3, 5), fields)]
    models = [spread(AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))) for shape in shapes]
    for number, anchor in enumerate(models):
        anchor.save_pretrained(tmp_path / f"anchor{number}")
        tokenizer.save_pretrained(tmp_path / f"anchor{number}")
    model = fresh([str(tmp_path / f"anchor{n}") for n in "01"], PST["paper"], routes=ROUTES[:1], adapter="identity")
    for stitch in model.space:
        folder = model.export(tmp_path / str(stitch.stitch_id), stitch_id=stitch.key).folder
        assert assert_plain(folder, logits(model, stitch_id=stitch.key)).config.vocab_size == 1000


@pytest.mark.parametrize(
    ("families", "fields", "reason"),
    [
        (
            ("llama", "llama"),
            ({}, {"num_attention_heads": 2}),
            "num_attention_heads is 4 in anchor 0 and 2 in anchor 1",
        ),
        (("llama", "llama"), ({}, {"rms_norm_eps": 1e-3}), "rms_norm_eps is 1e-06 in anchor 0 and 0.001 in anchor 1"),
        (("llama", "llama"), ({}, {"rope_theta": 500.0}), "rope_parameters is .*500.0"),
        (
            ("llama", "qwen3"),
            ({"head_dim": 8}, {"head_dim": 8}),
            "its blocks are of llama and qwen3, and those of qwen3",
        ),
    ],
)
def test_what_one_plain_model_cannot_be_is_told_and_becomes_a_stitched_one(
    families, fields, reason, tmp_path, tokenizer
):
    model = fresh(
        pair(tmp_path, tokenizer, families, fields=fields), PST["paper"], routes=ROUTES[:1], adapter="identity"
    )
    with pytest.raises(ValueError, match=reason):
        model.export(tmp_path / "plain", stitch_id=ROUTES[0], plain=True)
    done = model.export(tmp_path / "out", stitch_id=ROUTES[0])
    assert_close(logits(load(done.folder)), logits(model, stitch_id=ROUTES[0]))
    assert done.not_plain in (done.folder / CARD).read_text()


def test_half_precision_and_trained_whole(tmp_path, tokenizer):
    folders = pair(tmp_path, tokenizer)
    for number, (settings, how) in enumerate(((PST["paper"], {"dtype": "bfloat16"}), (PSTConfig(full=True), {}))):
        model = fresh(folders, settings, routes=ROUTES[:1], adapter="identity", **how)
        plain = AutoModelForCausalLM.from_pretrained(model.export(tmp_path / str(number), stitch_id=ROUTES[0]).folder)
        assert plain.dtype == model.anchors[0].dtype
        merged = copy.deepcopy(model)
        merged.merge_pst()
        torch.testing.assert_close(
            logits(plain), logits(merged, stitch_id=ROUTES[0]), atol=0.3 if how else 1e-4, rtol=0.05
        )


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_images_become_stitched_models(family, tmp_path):
    model = tuned(family)
    pixels = torch.randn(2, 3, *[model.config.image_size] * 2)
    for stitch in (model.space[0], model.space[len(model.space) // 2]):
        done = model.export(tmp_path / str(stitch.stitch_id), stitch_id=stitch.key)
        assert f"a {family} is exported as a stitched model alone" in done.not_plain
        again = type(model).from_pretrained(done.folder)
        with torch.no_grad():
            found, wanted = again(pixels).logits, model(pixels, stitch_id=stitch.key).logits
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert "AutoModelForImageClassification" in json.loads((done.folder / CONFIG).read_text())["auto_map"]


def test_refusals_leave_nothing_behind(made, bundle, tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for how, said in (
        ({}, "6 sizes to choose from: name one"),
        ({"stitch_id": 1, "budget": "1M"}, "both given"),
        ({"stitch_id": 99}, "not in this space"),
        ({"budget": 3}, "too small"),
    ):
        with pytest.raises(ValueError, match=said):
            made.export(tmp_path / "out", **how)
    for folder in (tmp_path / "full", bundle):
        with pytest.raises(ValueError, match="not an empty folder: export into a new one"):
            made.export(folder, stitch_id=0)
    with pytest.raises(ValueError, match="anchors in 8 bits, and no size exported"):
        load(bundle, quantization_config=BitsAndBytesConfig(load_in_8bit=True)).export(tmp_path / "out", stitch_id=0)

    def die(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("stitched_llama.models.export.write_bundle", die)
    with pytest.raises(OSError, match="disk full"):
        made.export(tmp_path / "out", stitch_id=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "full"]
    assert main(["export", str(bundle), str(tmp_path / "out")]) == 2
    assert "one of --budget and --stitch-id is needed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
