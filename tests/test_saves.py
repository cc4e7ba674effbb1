"""Saves: a reader beside a writer, two writers, links in a stage's place, and what is not saved."""

import json
import shutil
import threading
import time

import pytest
import torch
from conftest import fresh, ids_like, randomise
from test_bundle import assert_equal, contents, load
from transformers import AutoConfig, LlamaForCausalLM

from stitched_llama import PSTConfig
from stitched_llama.bundles import CONFIG, DIGESTS, TABLE, WEIGHTS, Bundle, atomic, write_bundle

KEY = "0[0:2]>1[4:5]"


# ---- readers and writers at once


def write(folder, number):
    """A bundle whose weights, table and config are all of `number`."""
    table = {"space_digest": "x", "stitches": [], "number": number}
    config = json.dumps({"space_digest": "x", "number": number})
    write_bundle(folder, {"w": torch.full((50_000,), float(number))}, table, {CONFIG: config})


def test_a_reader_beside_a_writer_gets_one_save(tmp_path):
    write(tmp_path, 0)
    done, failed = threading.Event(), []

    def save():
        try:
            for number in range(1, 10**6):
                write(tmp_path, number)
                if done.wait(0.005):
                    return
        except BaseException as error:
            failed.append(error)

    writer = threading.Thread(target=save)
    writer.start()
    try:
        found, until = [], time.monotonic() + 60
        while len(found) < 30 or (len(set(found)) < 2 and time.monotonic() < until):  # a lock favours nobody
            bundle = Bundle.open(tmp_path)
            weights = bundle.load_tensors(["w"])["w"]
            found.append((bundle.config["number"], bundle.table["number"], float(weights[0]), float(weights[-1])))
            time.sleep(0.002)  # else the lock is hardly ever free
    finally:
        done.set()
        writer.join()
    assert not failed, failed
    assert all(len(set(numbers)) == 1 for numbers in found), found
    assert len(set(found)) > 1, "the writer did not come to write"


def test_two_writers_lose_no_save(tmp_path):
    saved, failed = [], []

    def save(first):
        for number in range(first, 24, 2):
            try:
                write(tmp_path, number)
                saved.append(number)
            except BaseException as error:
                failed.append(error)

    writers = [threading.Thread(target=save, args=(first,)) for first in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failed, failed
    assert sorted(saved) == list(range(24))
    assert Bundle.open(tmp_path).table["number"] in (22, 23)
    assert set(contents(tmp_path)) == {CONFIG, TABLE, WEIGHTS, DIGESTS}


def test_who_waits_too_long_is_told(tmp_path, monkeypatch):
    write(tmp_path, 0)
    monkeypatch.setattr(atomic, "LOCK_SECONDS", 0.05)
    with atomic._locked(tmp_path):
        for wait in (lambda: write(tmp_path, 1), lambda: Bundle.open(tmp_path)):
            with pytest.raises(OSError, match="another process .*saves into .* wait for it, or end it"):
                wait()
    assert Bundle.open(tmp_path).table["number"] == 0


def test_an_auto_class_gets_one_save_too(bundle, tmp_path):
    """It reads `config.json` by itself, before the bundle may be saved again."""
    early = AutoConfig.from_pretrained(bundle, default_stitch_id=1)
    other = load(bundle)
    randomise(other, 5).save_pretrained(bundle, stitching_dtype="int8")
    again = load(bundle, config=early)
    assert again.config.stitching_dtype == "int8"
    assert again.config.default_stitch_id == 1
    assert_equal(again, load(bundle))


@pytest.mark.parametrize("place", ["folder", "file", "inside"])
def test_a_link_in_the_place_of_a_stage_is_not_followed(place, bundle, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("COMPLETE", TABLE, "precious"):
        (outside / name).write_text("mine")
    stage = bundle / ".staged"
    if place == "inside":
        stage.mkdir()
        (stage / TABLE).symlink_to(outside / TABLE)
        (stage / "COMPLETE").touch()
    else:
        stage.symlink_to(outside if place == "folder" else outside / "precious")
    model, before = load(_copy(bundle, tmp_path)), contents(bundle)
    for use in (
        lambda: load(bundle),
        lambda: model.save_pretrained(bundle),
        lambda: AutoConfig.from_pretrained(bundle),
    ):
        with pytest.raises(ValueError, match=r"\.staged.* is a link or a f"):
            use()
    assert contents(outside) == {name: b"mine" for name in ("COMPLETE", TABLE, "precious")}
    assert contents(bundle) == before


def _copy(bundle, tmp_path):
    ignore = shutil.ignore_patterns(".staged")
    return shutil.copytree(bundle, tmp_path / "whole", symlinks=True, ignore=ignore)


# ---- saving what cannot be


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"max_shard_size": "5GB"}, "max_shard_size='5GB' is not supported: the weights of a bundle are one file"),
        ({"variant": "fp16"}, "variant='fp16' is not supported"),
        ({"safe_serialization": False}, "only safetensors are written"),
        ({"distributed_checkpoint": True}, "written whole by one process"),
    ],
)
def test_options_that_would_mean_nothing_are_refused(option, named, made, tmp_path):
    for save in (made.save_pretrained, lambda _, **how: made.push_to_hub("me/x", **how)):
        with pytest.raises((ValueError, OSError), match=named if save == made.save_pretrained else "."):
            save(tmp_path / "b", **option)
    assert not (tmp_path / "b").exists()


def test_a_state_of_other_weights_is_refused(made, tmp_path):
    made.save_pretrained(tmp_path / "b", state_dict=made.state_dict(), safe_serialization=True, max_shard_size=None)
    assert_equal(load(tmp_path / "b"), made)
    other = {name: tensor + 1 if "lora_B" in name else tensor for name, tensor in made.state_dict().items()}
    with pytest.raises(ValueError, match="state_dict has another anchors.0.*lora_B"):
        made.save_pretrained(tmp_path / "c", state_dict=other)


def test_weights_that_are_no_numbers_are_not_saved(made, tmp_path):
    with torch.no_grad():
        made.stitching_layers["0_1_0"].proj.base_layer.bias[3] = float("nan")
    with pytest.raises(ValueError, match=r"stitching_layers.0_1_0.proj.bias of this model holds 1 of 48 entries"):
        made.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_an_anchor_inside_is_not_saved_by_itself(anchors, bundle, tmp_path):
    model = fresh(anchors["unequal"])
    model.anchors[1].save_pretrained(tmp_path / "before")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "before")
    assert torch.equal(plain(ids_like(1, 5)).logits, model(ids_like(1, 5), stitch_id="1[0:5]").logits)
    model.attach_pst(PSTConfig(rank=2))
    part = load(bundle, stitch_id=KEY)
    for anchor, named in (
        (model.anchors[1], "it carries PST: save the stitched model"),
        (part.anchors[1], "carries PST"),
    ):
        with pytest.raises(ValueError, match=f"LlamaForCausalLM is an anchor inside .* saved by itself: .*{named}"):
            anchor.save_pretrained(tmp_path / "b")
    fresh(anchors["unequal"]).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="only the blocks of some sizes were loaded"):
        load(tmp_path / "plain", stitch_id=KEY).anchors[1].save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()
    whole = fresh(anchors["unequal"], PSTConfig(full=True))
    whole.anchors[1].save_pretrained(tmp_path / "full")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "full")
    assert torch.equal(again(ids_like(1, 5)).logits, whole(ids_like(1, 5), stitch_id="1[0:5]").logits)
