"""The space: routes, ids, keys, digests, and every figure that the papers give for it."""

import itertools
import json

import pytest
from conftest import FAMILIES, python
from shapes import LLAMA_7B, LLAMA_13B, TOWER, VIT, config

from stitched_llama import StitchedLlamaConfig, StitchSpace
from stitched_llama.cli import main
from stitched_llama.space import anchor_spec


def space(*configs, **options):
    return StitchSpace.from_configs(configs, **options)


@pytest.fixture(scope="module")
def llamas():
    return space(LLAMA_7B, LLAMA_13B)


def test_llama_7b_and_13b_give_41_ids(llamas):
    assert len(llamas) == 41
    assert [s.stitch_id for s in llamas] == list(range(41))
    assert len(llamas.stitching_layers) == 31
    assert [s.params for s in llamas] == sorted(s.params for s in llamas)
    assert (llamas[0].key, llamas[40].key) == ("0[0:32]", "1[0:40]")


@pytest.mark.parametrize(
    ("key", "depth", "billions"),
    [
        ("0[0:31]>1[39:40]", 32, "6.907"),
        ("0[0:26]>1[33:40]", 33, "7.798"),
        ("0[0:8]>1[10:40]", 38, "11.451"),
        ("0[0:2]>1[3:40]", 39, "12.457"),
        ("1[0:40]", 40, "13.016"),
    ],
)
def test_parameters_of_the_papers_table_2(llamas, key, depth, billions):
    stitch = llamas[key]
    assert f"{stitch.params / 1e9:.3f}" == billions
    assert stitch.depth == depth


def test_nearest_depth_map_is_the_formula(llamas):
    routes = [s for s in llamas if not s.is_anchor]
    wanted = {f"0[0:{m * 32 // 40 + 1}]>1[{m + 1}:40]" for m in range(39)}
    assert {s.key for s in routes} == wanted
    assert len(routes) == 39
    for stitch in routes:  # a stitching layer serves the junctions that leave one block
        (junction,) = stitch.junctions
        assert junction.layer == f"0_1_{stitch.segments[0].stop - 1}"


def test_equal_depth_windows_of_sn_net():
    pair = space(*VIT[:2], kernel_size=2)
    assert len(pair) == 34 + 2
    assert len(pair.stitching_layers) == 11
    three = space(*VIT, kernel_size=2)
    assert len(three) == 71
    assert len(three.stitching_layers) == 22
    chain = space(*VIT, kernel_size=2, pairs="chain")
    assert len(chain) == 732
    assert len(chain.stitching_layers) == 33
    any_pair = space(*VIT, kernel_size=2, pairs="any")
    assert len(any_pair) == 3 + 3 * 34


def test_window_that_named_a_pair_first_owns_it():
    owner = {str(j): j.layer for j in space(*VIT[:2], kernel_size=2).junctions}
    assert owner["0[:2]>1[1:]"] == "0_1_0"
    assert owner["0[:3]>1[2:]"] == "0_1_1"
    assert owner["0[:1]>1[0:]"] == "0_1_0"
    assert owner["0[:12]>1[11:]"] == "0_1_10"


@pytest.mark.parametrize("options", [{}, {"direction": "slow-to-fast"}, {"direction": "both"}, {"pairs": "chain"}])
@pytest.mark.parametrize("depths", [(4, 4, 4), (2, 3, 5), (3, 7, 12)])
def test_ids_keys_and_routes_are_sound(depths, options):
    made = space(*(config("llama", 16 * (i + 1), d, 4, 32, vocab=64) for i, d in enumerate(depths)), **options)
    assert [s.stitch_id for s in made] == list(range(len(made)))
    assert [s.params for s in made] == sorted(s.params for s in made)
    assert len({s.key for s in made}) == len(made)
    assert [made[s.key] for s in made] == list(made)
    for stitch in made:
        assert stitch.segments[0].start == 0
        assert stitch.segments[-1].stop == depths[stitch.segments[-1].anchor]
        assert stitch.key == ">".join(f"{s.anchor}[{s.start}:{s.stop}]" for s in stitch.segments)
        assert all(len(segment) > 0 for segment in stitch.segments)
        assert len(stitch.junctions) == len(stitch.segments) - 1
        for left, right, junction in zip(stitch.segments, stitch.segments[1:], stitch.junctions):
            assert (junction.head, junction.head_stop) == (left.anchor, left.stop)
            assert (junction.tail, junction.tail_start) == (right.anchor, right.start)
            layer = made.stitching_layers[junction.layer]
            assert (layer.in_width, layer.out_width) == (16 * (left.anchor + 1), 16 * (right.anchor + 1))


def test_slow_to_fast_and_both_directions():
    down = {s.key for s in space(LLAMA_7B, LLAMA_13B, direction="slow-to-fast") if not s.is_anchor}
    assert "1[0:1]>0[1:32]" in down
    assert "1[0:38]>0[31:32]" in down
    assert len(down) == 31
    both = {s.key for s in space(LLAMA_7B, LLAMA_13B, direction="both") if not s.is_anchor}
    up = {s.key for s in space(LLAMA_7B, LLAMA_13B) if not s.is_anchor}
    assert both == up | down


def test_ties_are_numbered_by_key():
    twins = [config("llama", 16, 3, 4, 32, vocab=64)] * 2
    for one, other in itertools.pairwise(space(*twins)):
        assert (one.params, one.key) < (other.params, other.key)


@pytest.mark.parametrize("change", [{"kernel_size": 2}, {"stride": 2}, {"direction": "both"}, {"pairs": "any"}])
def test_digest_tells_options_apart(change):
    base = space(*TOWER)
    assert base.digest == space(*TOWER).digest != space(*TOWER, **change).digest


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_digest_tells_anchors_apart(field):
    changed = [{**fields, field: fields[field] + 4} for fields in TOWER]
    assert space(*TOWER).digest != space(*changed).digest


def test_digest_is_stable_across_versions_and_processes():
    code = "import sys; sys.path.insert(0, 'tests')\nfrom shapes import TOWER; from stitched_llama import StitchSpace\n"
    told = python("-c", code + "print(StitchSpace.from_configs(TOWER).digest)", PYTHONHASHSEED="7").stdout.strip()
    assert told == space(*TOWER).digest
    assert told.startswith("a0a5e1bbc06e19cd"), "a bundle of an earlier version would be refused: was that meant?"


@pytest.mark.parametrize(
    ("configs", "options", "names"),
    [
        ([LLAMA_13B, LLAMA_7B], {}, ["13,015,864,320", "6,738,415,616", "small to large"]),
        ([LLAMA_7B], {}, ["1 anchor", "two"]),
        ([LLAMA_7B, {**LLAMA_13B, "vocab_size": 33000}], {}, ["32000", "33000"]),
        ([LLAMA_7B, {**LLAMA_13B, "sliding_window": 4096}], {}, ["4096", "sliding window"]),
        ([LLAMA_7B, {**LLAMA_13B, "model_type": "gpt2"}], {}, ["gpt2", "llama"]),
        ([LLAMA_7B, {"model_type": "llama", "hidden_size": 8}], {}, ["num_hidden_layers"]),
        ([LLAMA_7B, LLAMA_13B], {"direction": "up"}, ["'up'", "slow-to-fast"]),
        ([LLAMA_7B, LLAMA_13B], {"pairs": "some"}, ["'some'", "chain"]),
        ([LLAMA_7B, LLAMA_13B], {"kernel_size": 33}, ["33", "32"]),
        ([LLAMA_7B, LLAMA_13B], {"stride": 0}, ["stride 0", "1..32"]),
        ([LLAMA_7B, {**LLAMA_13B, "num_hidden_layers": 1, "intermediate_size": 10**6}], {}, ["1 block", "2"]),
    ],
)
def test_bad_input_is_named_with_both_values(configs, options, names):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (its parts are looked for below)
        space(*configs, **options)
    assert all(name in str(error.value) for name in names), str(error.value)


@pytest.mark.parametrize("stitch_id", [41, -1, "0[0:5]>1[9:40]", "41", True, 3.0])
def test_unknown_stitch_names_the_range(llamas, stitch_id):
    assert stitch_id not in llamas
    with pytest.raises(ValueError, match=r"0\.\.40"):
        llamas[stitch_id]


def test_configuration_describes_the_same_space(anchors):
    for family, (_, options) in FAMILIES.items():
        made = StitchedLlamaConfig.from_anchor_configs(anchors[family], **options)
        assert made.stitch_space().digest == made.space_digest == space(*anchors[family], **options).digest


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_configuration_objects_folders_and_json_agree(family, tied, tmp_path):
    from transformers import AutoConfig

    fields = [config(family, 16 * n, n + 1, 4, 32, vocab=64, head_dim=8, tie_word_embeddings=tied) for n in (1, 2)]
    fields = [{**one, "sliding_window": None} for one in fields]
    objects = [AutoConfig.for_model(**one) for one in fields]
    for number, one in enumerate(objects):
        one.save_pretrained(tmp_path / str(number))
    digest = space(*fields).digest
    assert space(*(str(tmp_path / n) for n in "01")).digest == digest
    assert StitchedLlamaConfig.from_anchor_configs(objects).space_digest == digest
    assert StitchedLlamaConfig.from_anchor_configs([tmp_path / "0", tmp_path / "1"]).space_digest == digest
    assert anchor_spec(StitchedLlamaConfig.from_anchor_configs(objects).anchor_configs[0]).tied == tied


FIELDS = {"stitch_id", "key", "params", "macs_per_token", "weight_bytes", "kv_bytes_per_token", "segments"}


def test_command_prints_json(anchors, capsys):
    assert main(["space", *anchors["unequal"], "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == [stitch.to_dict() for stitch in space(*anchors["unequal"])]
    assert all(set(row) == FIELDS for row in rows)
    assert rows[0]["segments"] == [[0, 0, 3]]


def test_command_takes_every_option(anchors, capsys):
    options = ["--kernel-size", "2", "--stride", "1", "--direction", "both", "--pairs", "any", "--json"]
    assert main(["space", *anchors["equal"], *options, "--dtype", "float32"]) == 0
    rows = json.loads(capsys.readouterr().out)
    made = space(*anchors["equal"], kernel_size=2, direction="both", pairs="any")
    assert [row["key"] for row in rows] == [stitch.key for stitch in made]
    assert all(row["weight_bytes"] == 4 * row["params"] for row in rows)


def test_command_is_also_the_module_and_needs_no_torch(anchors):
    told = python("-X", "importtime", "-m", "stitched_llama", "space", *anchors["unequal"], "--json")
    assert json.loads(told.stdout)[-1]["key"] == "1[0:5]"
    assert "| torch" not in told.stderr
    assert "stitched_llama" in told.stderr


def test_command_prints_a_table(anchors, capsys):
    assert main(["space", *anchors["three"], "--pairs", "chain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    made = space(*anchors["three"], pairs="chain")
    assert len(lines) == len(made) + 2
    assert sum(line.endswith("anchor") for line in lines) == 3
    assert f"{len(made)} stitches on {len(made.stitching_layers)} stitching layers" in lines[-1]


@pytest.mark.parametrize("wrong", ["no/such/folder", "no_such_folder", "empty", "text", "list", "reversed"])
def test_command_tells_what_is_wrong_in_one_line(wrong, anchors, tmp_path, capsys):
    given = [str(tmp_path), anchors["unequal"][1]]
    if wrong == "reversed":
        given = anchors["unequal"][::-1]
    elif wrong.startswith("no"):
        given[0] = wrong
    elif wrong != "empty":
        (tmp_path / "config.json").write_text("not json" if wrong == "text" else "[1]")
    assert main(["space", *given]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert told.err.startswith("stitched-llama: ")
    assert ("small to large" if wrong == "reversed" else given[0]) in told.err
