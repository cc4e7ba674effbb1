"""Palette gain: what sizes between two anchors are worth, against figures worked out by hand."""

import json
import math
import random

import pytest
from conftest import ROOT

from stitched_llama import StitchSpace, StitchTable, palette_gain
from stitched_llama.space import palette_gains


def config(depth, width=64):
    return {
        "model_type": "llama", "hidden_size": width, "num_hidden_layers": depth, "intermediate_size": 2 * width,
        "num_attention_heads": 4, "vocab_size": 100, "tie_word_embeddings": True,
    }  # fmt: skip


def aligned(depth, targets):
    shrunk = {"depth": depth, "target_blocks": targets, "shared": ["embedding", "head"]}
    return StitchSpace.from_configs(
        [config(len(targets)) | {"shrunk_from": shrunk}, config(depth)], junctions="aligned"
    )


def table(values, test=None):
    return StitchTable().with_metrics("loss", values).with_metrics("loss_test", values if test is None else test)


@pytest.fixture(scope="module")
def space():
    """Anchors of 6 and 11 blocks of equal width that share an embedding: four stitches of 7 to 10 blocks, evenly spaced."""
    made = aligned(11, [0, 2, 4, 6, 8, 10])
    assert [sum(len(s) for s in stitch.segments) for stitch in made] == [6, 7, 8, 9, 10, 11]
    return made


def line(space):
    return {stitch.key: 3.0 - stitch.depth / 11 for stitch in space}


def test_evenly_spaced_stitches_on_the_line_give_n_over_2_n_plus_1(space):
    assert palette_gain(space, table(line(space))) == pytest.approx(4 / (2 * 5))
    assert palette_gain(space, table(line(space)), by="macs") == pytest.approx(4 / 10)


def test_stitches_that_are_worse_than_the_small_anchor_are_not_chosen(space):
    values = line(space) | {stitch.key: 9.0 for stitch in space if not stitch.is_anchor}
    assert palette_gain(space, table(values)) == 0.0


def test_what_was_chosen_is_judged_on_other_rows(space):
    """Chosen by luck, worse than the small anchor on the test rows: the gain is below zero."""
    values = line(space)
    test = values | {stitch.key: 4.0 for stitch in space if not stitch.is_anchor}
    small, large = values[space[0].key], values[space[5].key]
    assert palette_gain(space, table(values, test)) == pytest.approx(4 / 5 * (small - 4.0) / (small - large))


def test_an_anchor_counts_at_the_better_of_alone_and_inside(space):
    values, small, large = line(space), space[0].key, space[5].key
    gap = values[small] - values[large]
    better = {small: {"loss": values[small] - gap / 5, "loss_test": values[small] - gap / 5}}
    # what is left of the gap is 4/5 of it; the stitches lie 0, 1/4, 2/4, 3/4 up that
    assert palette_gain(space, table(values), better) == pytest.approx((0 + 1 / 4 + 2 / 4 + 3 / 4) / 5)
    worse = {small: {"loss": 9.0, "loss_test": 9.0}}
    assert palette_gain(space, table(values), worse) == pytest.approx(4 / 10)


def test_esta_table_2_reaches_61_percent():
    """Quality 100 -> 113, 114, 115, 120 -> 123 at 6.7 -> 6.9, 7.8, 11.5, 12.5 -> 13.0 B."""
    from shapes import LLAMA_7B, LLAMA_13B

    space = StitchSpace.from_configs([LLAMA_7B, LLAMA_13B])
    quality = {
        "0[0:32]": 100, "0[0:31]>1[39:40]": 113, "0[0:26]>1[33:40]": 114, "0[0:8]>1[10:40]": 115, "0[0:2]>1[3:40]": 120,
        "1[0:40]": 123,
    }  # fmt: skip
    made = StitchTable().with_metrics("accuracy", quality).with_metrics("accuracy_test", quality)
    assert palette_gain(space, made, metric="accuracy") == pytest.approx(0.61, abs=0.01)


def test_anchors_of_equal_cost_have_no_gain():
    """One with a head of its own, one without: as many MACs, and a table that is saved all the same."""
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 8, "num_attention_heads": 2,
              "num_key_value_heads": 2, "vocab_size": 32}  # fmt: skip
    space = StitchSpace.from_configs([config | {"tie_word_embeddings": True}, config | {"tie_word_embeddings": False}])
    loss = {stitch.key: 3.0 - stitch.stitch_id for stitch in space}
    table = StitchTable().with_metrics("loss", loss).with_metrics("loss_test", loss)
    assert math.isnan(palette_gain(space, table, by="macs"))
    assert table.to_dict(space)["palette_gain"]["loss"]["macs"] is None


def test_no_gap_is_no_number(space):
    assert math.isnan(palette_gain(space, table({stitch.key: 1.0 for stitch in space})))


def test_bad_input_is_named(space):
    with pytest.raises(ValueError, match="no loss_test: palette gain needs"):
        palette_gain(space, StitchTable().with_metrics("loss", line(space)))
    with pytest.raises(ValueError, match="'params' or 'macs'"):
        palette_gain(space, table(line(space)), by="seconds")


def test_gains_of_every_metric_with_test_rows(space):
    made = table(line(space)).with_metrics("exact_match", line(space))
    assert palette_gains(space, made) == {"loss": {"params": pytest.approx(0.4), "macs": pytest.approx(0.4)}}


def test_the_staircase_of_a_result_says_what_the_package_says(space, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import staircase

    rng = random.Random(0)
    losses = {stitch.key: 3 - stitch.params / space.anchor_stitch(-1).params + rng.random() / 9 for stitch in space}
    table = StitchTable().with_metrics("loss", losses, decides=True)
    table = table.with_metrics("loss_test", {key: value + rng.random() / 9 for key, value in losses.items()})
    alone = {space.anchor_stitch(0).key: {"loss": 2.2, "loss_test": 2.3}}
    row = {"table": table.to_dict(space), "baselines": alone}
    (tmp_path / "result.json").write_text(json.dumps(row))
    points = [{"params": s.params, "macs": s.macs, "loss": 9.0, "loss_test": 9.0} for s in space]
    (tmp_path / "untrained.json").write_text(json.dumps({"methods": {"nothing": points}}))
    out = tmp_path / "stairs.png"
    words = [f"ours={tmp_path / 'result.json'}", "--untrained", str(tmp_path / "untrained.json"), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["staircase.py", *words])
    staircase.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["palette_gain"]
    wanted = {by: round(palette_gain(space, table, alone, "loss", by), 3) for by in ("params", "macs")}
    assert told == {"ours": wanted, "nothing": {"params": 0.0, "macs": 0.0}}
    assert out.read_bytes().startswith(b"\x89PNG")
