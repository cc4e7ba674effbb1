"""Bundles that are not what was saved: no change of weights, config, table or anchors loads silently."""

import json
import shutil

import pytest
import torch
from conftest import fresh, with_table
from safetensors.torch import save_file
from test_bundle import assert_equal, load, tensors
from test_damage import edit
from tiny_runs import dataset, trainer
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

from stitched_llama import PSTConfig
from stitched_llama.bundles import CONFIG, DIGESTS, TABLE, WEIGHTS, Bundle, verify_digests
from stitched_llama.cli import main
from stitched_llama.models import references
from stitched_llama.training import Collator

KEY = "0[0:2]>1[4:5]"


@pytest.fixture(scope="module")
def original(anchors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    with_table(fresh(anchors["unequal"], PSTConfig(rank=4))).save_pretrained(folder)
    return folder


@pytest.fixture
def bundle(original, tmp_path):
    return shutil.copytree(original, tmp_path / "bundle")


def change_tensors(bundle, how):
    found = tensors(bundle)
    first, second = sorted(n for n in found if n.endswith("0.self_attn.q_proj.lora_A.weight"))
    layers = sorted(n for n in found if n.endswith("proj.weight"))
    if how == "flip":
        raw = bytearray((bundle / WEIGHTS).read_bytes())
        raw[-1] ^= 1
        return (bundle / WEIGHTS).write_bytes(raw)
    if how == "swap":
        found[layers[0]], found[layers[1]] = found[layers[1]], found[layers[0]]
    elif how == "dtype":
        found[second] = found[second].to(torch.float64)
    elif how == "zeros":
        found[second] = torch.zeros_like(found[second])
    elif how in ("nan", "inf"):
        found[layers[0]][1, 2] = float(how)
    elif how == "extra":
        found["stitching_layers.9_9_9.proj.weight"] = found[layers[0]].clone()
    return save_file(found, bundle / WEIGHTS, metadata={"format": "pt"})


def change_config(how):
    changes = {
        "no pst": lambda c: c.update(pst=None),
        "no bias": lambda c: c["pst"].update(stitch_bias=False),
        "no ranks": lambda c: c["pst"].update(rank=0, stitching_rank=0),
        "rope": lambda c: c["anchor_configs"][1]["rope_parameters"].update(rope_theta=3.0),
        "eps": lambda c: c["anchor_configs"][1].update(rms_norm_eps=0.5),
        "act": lambda c: c["anchor_configs"][1].update(hidden_act="relu"),
    }
    return changes[how]


WEIGHT_CHANGES = ("flip", "swap", "dtype", "zeros", "nan", "inf", "extra")
CONFIG_CHANGES = ("no pst", "no bias", "no ranks", "rope", "eps", "act")


@pytest.mark.parametrize("how", [*WEIGHT_CHANGES, *CONFIG_CHANGES, "metrics"])
def test_no_change_loads_whole_or_in_part_or_passes_verify(how, bundle, capsys):
    if how in WEIGHT_CHANGES:
        change_tensors(bundle, how)
    elif how in CONFIG_CHANGES:
        edit(bundle / CONFIG, change_config(how))
    else:
        edit(bundle / TABLE, lambda table: table["stitches"][2]["metrics"].update(loss=0.5))
    name = WEIGHTS if how in WEIGHT_CHANGES else TABLE if how == "metrics" else CONFIG
    for loader in (load, AutoModelForCausalLM.from_pretrained):
        for part in ({}, {"stitch_id": KEY}, {"budget": "100GB"}):
            with pytest.raises(ValueError, match=f"{name} changed: it has SHA-256 .*; restore or download it again"):
                loader(bundle, **part)
    for flags in ([], ["--no-anchors"]):
        assert main(["bundle", "verify", str(bundle), *flags]) == 2
    assert f"{name} changed" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["nan", "inf", "extra", "no pst", "no bias", "no ranks"])
def test_what_digests_written_anew_cannot_hide_is_refused_too(how, bundle):
    if how in WEIGHT_CHANGES:
        change_tensors(bundle, how)
    else:
        edit(bundle / CONFIG, change_config(how))
    assert main(["bundle", "digest", str(bundle)]) == 0
    named = "stitching_layers.*1 of .* entries that are NaN" if how in ("nan", "inf") else "has no place for"
    for part in ({}, {"stitch_id": "0[0:1]>1[1:5]"}):
        with pytest.raises(ValueError, match=named):
            load(bundle, **part)


def test_a_bundle_without_digests_is_refused_with_both_ways_out(bundle, capsys):
    model = load(bundle)
    (bundle / DIGESTS).unlink()
    for loader in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(
            ValueError, match=r"has no digests.json: .*bundle digest`, or load it once with verify=False"
        ):
            loader(bundle)
        assert_equal(loader(bundle, verify=False), model)
    assert main(["bundle", "show", str(bundle)]) == 2
    assert main(["bundle", "show", str(bundle), "--no-verify"]) == 0
    assert main(["bundle", "digest", str(bundle)]) == 0
    assert "recorded config.json, model.safetensors" in capsys.readouterr().out
    assert_equal(load(bundle), model)


def test_a_way_to_verify_that_is_unknown_is_refused(bundle):
    with pytest.raises(ValueError, match="verify is 'all'; True, False or 'full' is needed"):
        load(bundle, verify="all")


def test_the_digests_themselves_are_no_less_checked(bundle):
    whole = json.loads((bundle / DIGESTS).read_text())["sha256"]
    for content, named in (
        ({name: digest for name, digest in whole.items() if name != TABLE}, "stitches.json is not recorded"),
        (whole | {"../x": "0"}, "digests.json is damaged"),
        ("x", "digests.json is damaged"),
        (whole | {WEIGHTS: "0" * 64}, "model.safetensors changed"),
    ):
        (bundle / DIGESTS).write_text(json.dumps({"sha256": content}))
        with pytest.raises(ValueError, match=named):
            load(bundle)
    (bundle / DIGESTS).write_text(json.dumps({"sha256": whole}))
    (bundle / "generation_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no generation_config.json, which digests.json records"):
        load(bundle)


def test_checkpoints_of_a_trainer_are_bundles_with_digests(anchors, tmp_path):
    made = trainer(
        fresh(anchors["unequal"], PSTConfig(rank=2)), tmp_path, max_steps=1, save_strategy="steps", save_steps=1
    )
    made.train()
    folder = tmp_path / "checkpoint-1"
    verify_digests(folder)
    change_tensors(folder, "zeros")
    with pytest.raises(ValueError, match="model.safetensors changed"):
        made.model.load_bundle(Bundle.open(folder))


def test_verify_finds_a_table_that_does_not_follow(bundle, capsys):
    for change, named in (
        (lambda t: t["stitches"][1].update(params=7), "params 7 for stitch"),
        (lambda t: t["stitches"][0].update(published=False), "published False for stitch"),
        (lambda t: t["stitches"][1].update(segments=[]), r"segments [] for stitch"),
    ):
        before = (bundle / TABLE).read_text()
        edit(bundle / TABLE, change)
        main(["bundle", "digest", str(bundle)])
        assert main(["bundle", "verify", str(bundle), "--no-anchors"]) == 2
        assert named in capsys.readouterr().err
        (bundle / TABLE).write_text(before)
    edit(bundle / TABLE, lambda t: t["stitches"].pop())
    with pytest.raises(ValueError, match="stitches.json has 5 stitches, or others, where config.json has 6"):
        load(bundle, verify=False)


def test_a_part_of_a_bundle_that_is_saved_again_follows_from_itself(bundle, tmp_path):
    """Metrics of test rows give a palette gain, of the stitches that are held."""
    model = load(bundle)
    values = {stitch.key: 3.0 - 0.1 * stitch.stitch_id for stitch in model.space}
    model.table = model.table.with_metrics("loss", values).with_metrics("loss_test", values)
    model.save_pretrained(tmp_path / "whole")
    load(tmp_path / "whole", stitch_id=KEY).save_pretrained(tmp_path / "part")
    for name, gain in (("whole", True), ("part", False)):
        assert main(["bundle", "verify", str(tmp_path / name)]) == 0
        found = json.loads((tmp_path / name / TABLE).read_text())["palette_gain"]["loss"]["params"]
        assert (found is not None) == gain


def test_every_byte_of_an_anchor_is_read(bundle, anchors, tmp_path, monkeypatch, capsys):
    """Of a tensor of many pages too; a large anchor is sampled on loading and read whole by `bundle verify`."""
    own = [str(shutil.copytree(folder, tmp_path / str(n))) for n, folder in enumerate(anchors["unequal"])]
    wide = LlamaForCausalLM.from_pretrained(own[1])
    wide.model.embed_tokens.weight.data = torch.randn(260, 48).repeat(1, 1)
    wide.config.intermediate_size = 2048
    wide = LlamaForCausalLM(wide.config)
    wide.save_pretrained(own[1])
    fresh(own, PSTConfig(rank=2)).save_pretrained(tmp_path / "b")
    raw = bytearray((tmp_path / "1" / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    name = "model.layers.2.mlp.up_proj.weight"
    start = header + json.loads(raw[8:header])[name]["data_offsets"][0]
    raw[start + 12_345] ^= 1  # between two of the sixteen pages
    (tmp_path / "1" / WEIGHTS).write_bytes(raw)
    with pytest.raises(ValueError, match="anchor 1 changed: model.layers.2 "):
        load(tmp_path / "b")
    with pytest.raises(ValueError, match="anchor 1 changed: model.layers.2 "):
        load(tmp_path / "b", stitch_id="0[0:1]>1[1:5]")
    monkeypatch.setattr(references, "WHOLE_BELOW", 0)
    load(tmp_path / "b")
    with pytest.raises(ValueError, match="anchor 1 changed: model.layers.2 "):
        load(tmp_path / "b", verify="full")
    assert main(["bundle", "verify", str(tmp_path / "b")]) == 2
    assert "anchor 1 changed: model.layers.2 " in capsys.readouterr().err


# ---- metrics of other weights


def test_a_plain_trainers_steps_outdate_the_metrics(anchors, tmp_path, caplog):
    model = with_table(fresh(anchors["unequal"], PSTConfig(rank=4)))
    model.table = model.table.with_metrics("loss_before", {key: 9.0 for key in model.keys})
    model.save_pretrained(tmp_path / "measured")
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to="none", save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=dataset(), data_collator=Collator(0)).train()
    model.save_pretrained(tmp_path / "trained")
    assert "loss: measured on other weights than these and left out" in caplog.text
    tables = [json.loads((tmp_path / name / TABLE).read_text()) for name in ("measured", "trained")]
    assert [sorted(table["stitches"][0]["metrics"]) for table in tables] == [["loss", "loss_before"], ["loss_before"]]
    assert [table["metric"] for table in tables] == ["loss", None]
    again = load(tmp_path / "trained")
    assert [stitch.is_anchor for stitch in again.published] == [True, True]
    assert "loss" not in (tmp_path / "trained" / "README.md").read_text().split("## Published sizes")[1]
    again.table = again.table.with_metrics(
        "loss", dict(load(tmp_path / "measured").table.metrics["loss"]), decides=True
    )
    again.save_pretrained(tmp_path / "measured again")  # the same figures, measured on these weights
    assert len(load(tmp_path / "measured again").published) == 3


def test_metrics_stay_with_the_weights_they_belong_to(bundle, tmp_path, caplog):
    for how in ({}, {"dtype": torch.bfloat16}, {"stitch_id": KEY}):
        model = load(bundle, **how)
        model.config.default_stitch_id = KEY
        for dtype in ("int8", None):
            model.save_pretrained(tmp_path / "again", stitching_dtype=dtype)
            kept = {key: model.table.metrics["loss"][key] for key in model.keys}
            assert load(tmp_path / "again").table.metrics["loss"] == kept
    assert not caplog.text
    model.load_state_dict({name: tensor + 1 for name, tensor in tensors(tmp_path / "again").items()})
    model.save_pretrained(tmp_path / "other")
    assert not load(tmp_path / "other").table.metrics


def test_a_checkpoint_that_a_plain_trainer_reads_is_checked(bundle):
    """`Trainer` reads `model.safetensors` by itself and asks for no strictness."""
    model, found = load(bundle), tensors(bundle)
    name = sorted(found)[0]
    with pytest.raises(RuntimeError, match="hold 1 that this model has no place for, the first is x"):
        model.load_state_dict({**found, "x": torch.zeros(1)}, strict=False)
    found[name] = torch.full_like(found[name], float("nan"))
    with pytest.raises(ValueError, match=f"tensor {name} of the checkpoint holds"):
        model.load_state_dict(found, strict=False)
    assert_equal(model, load(bundle))
