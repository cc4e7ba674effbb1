"""What comes from others: no size of theirs is believed, no control character of theirs is printed."""

import builtins
import json
import logging
import resource
import shutil
import time
from pathlib import Path

import pytest
from conftest import fresh, with_table
from image_anchors import build
from test_bundle import load
from test_damage import edit

from stitched_llama import PSTConfig, StitchedViTForImageClassification, StitchSpace
from stitched_llama.bundles import CONFIG, DIGESTS, GENERATION, TABLE
from stitched_llama.cli import main
from stitched_llama.cli.chat import Chat, converse
from stitched_llama.space import anchor_spec, intervals, printable


@pytest.fixture(scope="module")
def originals(anchors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    with_table(fresh(anchors["unequal"], PSTConfig(rank=2))).save_pretrained(folder / "llama")
    for number, anchor in enumerate(build("vit")):
        anchor.save_pretrained(folder / "vits" / str(number))
    images = StitchedViTForImageClassification.from_anchors([str(folder / "vits" / str(number)) for number in range(2)])
    images.save_pretrained(folder / "vit")
    return folder


@pytest.fixture
def bundle(originals, tmp_path):
    return shutil.copytree(originals / "llama", tmp_path / "bundle")


@pytest.fixture
def images(originals, tmp_path):
    return shutil.copytree(originals / "vit", tmp_path / "images")


def sign(bundle):
    """As whoever made the bundle would have."""
    assert main(["bundle", "digest", str(bundle)]) == 0


def set_field(*path, value):
    def change(content):
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value

    return change


# ---- sizes and kinds


SIZES = [
    (CONFIG, ("anchor_configs", 1, "num_hidden_layers"), 20_000, "num_hidden_layers of the llama config is 20000.*at most 512"),
    (CONFIG, ("anchor_configs", 1, "num_hidden_layers"), 10**8, "num_hidden_layers"),
    (CONFIG, ("anchor_configs", 1, "num_hidden_layers"), 500, "500 blocks, its fingerprint is of [0-9]+ parts"),
    (CONFIG, ("anchor_configs", 0, "vocab_size"), 10**12, "vocab_size of the llama config is 10+: .* at most 1,000,000,000"),
    (CONFIG, ("anchor_configs", 0, "num_labels"), 10**8, "num_labels of anchor 0 .* is 100000000: at most 100,000"),
    (CONFIG, ("num_labels",), 10**8, "num_labels of .*config.json is 100000000"),
    (CONFIG, ("keys",), ["x"] * 10**5, "keys of .*config.json has 100,000 entries"),
    (CONFIG, ("keys",), ["0[0:3]", "0[0:3]"], "names a stitch twice"),
    (CONFIG, ("keys",), ["nonsense"], "'nonsense', which is no stitch"),
    (CONFIG, ("kernel_size",), 10**9, "kernel_size 1000000000"),
    (CONFIG, ("kernel_size",), "wide", "config.json.*kernel_size"),
    (CONFIG, ("anchor_configs",), [{}] * 1000, "a list of at most 64 is needed"),
    (CONFIG, ("anchor_configs", 0, "hidden_act"), "nonsense", "nonsense"),
    (CONFIG, ("to_dict",), 1, "'to_dict', which is no setting"),
    (CONFIG, ("stitching_dtype",), "int4", "stitching_dtype .* is 'int4'"),
    (CONFIG, ("pst", "rank"), "many", "rank of anchor 0 is 'many'"),
    (CONFIG, ("anchors", 0, "fingerprint"), 3, "anchor 0 has no fingerprint"),
    (TABLE, ("interval_count",), 10**18, "interval_count is 10+: .* at most 1,000,000,000"),
    (CONFIG, ("pst", "stitch_rank"), 10**9, "stitch_rank on anchor 0 is 1000000000"),
    (CONFIG, ("pst", "stitch_bias"), "false", "stitch_bias is 'false': true or false"),
    (CONFIG, ("pst", "dropout"), float("nan"), "dropout is nan: a share"),
    (CONFIG, ("junctions",), [[0, 1]] * 10**5, "junctions has 100,000 entries: a space has at most 10,000"),
    (CONFIG, ("junctions",), [["x" * 10**6]], "junction ..x{100,200} cannot be read"),
    (CONFIG, ("routes",), ["0[0:1]>1[1:5]"] * 10**5, "routes has 100,000 entries: a space has at most 10,000"),
    (CONFIG, ("routes",), ["x" * 10**6], "route .x{100,200} cannot be read"),
    (CONFIG, ("anchor_configs", 0, "shrunk_from"), {"depth": 5, "target_blocks": [0, 2, 4], "shared": 3}, "shared in shrunk_from .* is 3"),
    (TABLE, ("alone",), {"\x1b[2J": {"loss": 1.0}}, "has an anchor alone as .*, which is no anchor of its space"),
    (TABLE, ("alone",), {"0[0:3]": {"loss": "low"}}, "loss is 'low': a number"),
    (TABLE, ("alone",), 3, "stitches.json is damaged"),
    (TABLE, ("interval_count",), 1.5, "interval_count is 1.5"),
    (TABLE, ("stitches", 0, "metrics"), {"loss": "low"}, "loss is 'low': a number"),
    (TABLE, ("stitches", 0, "key"), "0[0:3]\x1b[2J", "stitches.json has 6 stitches, or others"),
    (GENERATION, ("to_dict",), 1, "generation_config.json has the field 'to_dict'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "path", "value", "named"), SIZES, ids=[f"{s[1][-1]}-{repr(s[2])[:20]}" for s in SIZES]
)
def test_what_cannot_be_is_refused_by_name_at_once(name, path, value, named, bundle):
    edit(bundle / name, set_field(*path, value=value))
    sign_files(bundle)
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=named):
        load(bundle)
    assert main(["bundle", "verify", str(bundle)]) == 2
    assert main(["bundle", "show", str(bundle)]) in (0, 2)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 400_000, "kilobytes"


def sign_files(bundle):
    """Writes digests anew where even `bundle digest` refuses the content."""
    from stitched_llama.bundles import recorded_files, write_digests

    (bundle / DIGESTS).unlink()
    write_digests(bundle, recorded_files(bundle))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"space_digest": ' + "1" * 5000 + "}"])
@pytest.mark.parametrize("name", [CONFIG, TABLE, GENERATION])
def test_nesting_and_numbers_without_end_are_named(name, text, bundle):
    (bundle / name).write_text(text)
    sign_files(bundle)
    with pytest.raises(ValueError, match=f"{name} is not JSON"):
        load(bundle)


def test_classes_by_number_alone_are_bounded(images, originals):
    for path in (("anchor_configs", 1), ()):
        content = json.loads((images / CONFIG).read_text())
        home = content
        for step in path:
            home = home[step]
        home.pop("id2label", None)
        home["num_labels"] = 10**8
        (images / CONFIG).write_text(json.dumps(content))
        sign_files(images)
        with pytest.raises(ValueError, match="num_labels of .* is 100000000: at most 100,000 without their names"):
            StitchedViTForImageClassification.from_pretrained(images)
    small, large = (str(originals / "vits" / str(number)) for number in range(2))
    hostile = shutil.copytree(large, images / "hostile")
    edit(hostile / CONFIG, lambda c: (c.pop("id2label"), c.update(num_labels=10**8)))
    with pytest.raises(ValueError, match="num_labels of the config.json of anchor .* is 100000000"):
        StitchedViTForImageClassification.from_anchors([small, str(hostile)])


def test_more_intervals_than_stitches_take_no_room():
    assert intervals([1, 2, 5], 10**9) == [[0], [1], [2]]


def test_a_space_of_too_many_stitches_is_refused():
    config = {
        "hidden_size": 8,
        "num_hidden_layers": 300,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "vocab_size": 8,
    }
    configs = [{"model_type": "llama", **config, "intermediate_size": 8 + i} for i in range(3)]
    with pytest.raises(ValueError, match="more than 10,000 stitches: a smaller kernel_size"):
        StitchSpace.from_configs(configs, pairs="chain")


IMAGE_FIELDS = {
    "vit": ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "patch_size", "num_channels",
            "image_size", "num_labels", "id2label", "qkv_bias"),
    "dinov2": ("hidden_size", "mlp_ratio", "patch_size", "use_swiglu_ffn", "use_mask_token"),
    "swin": ("embed_dim", "depths", "num_heads", "mlp_ratio", "window_size", "patch_size", "use_absolute_embeddings"),
    "convnext": ("hidden_sizes", "depths", "patch_size", "num_channels", "layer_scale_init_value"),
    "resnet": ("hidden_sizes", "depths", "embedding_size", "layer_type", "num_channels", "downsample_in_first_stage"),
    "mobilenet_v2": ("depth_multiplier", "depth_divisible_by", "min_depth", "expand_ratio", "output_stride", "image_size"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "field"), [(family, field) for family, fields in IMAGE_FIELDS.items() for field in fields]
)
def test_fields_of_image_families_are_checked_as_those_of_decoders(family, field):
    for value in ("x", -1, [], {"a": 1}, [1, "x"], float("nan"), 10**30, [10**8] * 4):
        if field == "id2label" and isinstance(value, dict):
            continue
        if field in ("hidden_sizes", "num_heads") and value == [10**8] * 4:
            value = [10**10] * 4
        with pytest.raises(ValueError, match=f"{field}|image_size"):
            anchor_spec({"model_type": family, "image_size": 224, field: value})
    assert anchor_spec({"model_type": family, "image_size": 224, field: None}).params


@pytest.mark.parametrize("value", [["llama"], {"llama": 1}, 3, None])
def test_a_model_type_that_is_no_name_is_refused(value):
    with pytest.raises(ValueError, match="model_type .* is not supported"):
        anchor_spec({"model_type": value})


# ---- terminals


def test_text_of_others_is_printed_as_text():
    assert printable("a\x1b[31m\x07\x9b\ud800\u202eb\n\tü🦙") == "a\\x1b[31m\\x07\\x9b\\ud800\\u202eb\n\tü🦙"


def test_logs_of_a_command_are_printed_as_text(bundle, monkeypatch, caplog):
    def run(options):
        logging.getLogger("transformers.somewhere").warning("got %s", "\x1b[2J")
        return 0

    monkeypatch.setattr("stitched_llama.cli.bundle.run_show", run)
    assert main(["bundle", "show", str(bundle)]) == 0
    assert caplog.messages == ["got \\x1b[2J"]
    assert logging.getLogRecordFactory() is logging.LogRecord


def test_a_terminal_obeys_nothing_of_a_bundle(bundle, capsys):
    escape = "\x1b]0;owned\x07"
    for name, change in (
        (CONFIG, set_field("anchors", 0, "name_or_path", value=f"here{escape}")),
        (CONFIG, set_field("anchors", 0, "revision", value=f"main{escape}")),
        (CONFIG, set_field("model_type", value=escape)),
        (CONFIG, set_field("anchor_configs", 0, "hidden_act", value=escape)),
        (CONFIG, lambda c: c["pst"].update({escape: 1})),
        (TABLE, lambda t: t["stitches"][0]["metrics"].update({escape: 1.0})),
        (TABLE, lambda t: t["stitches"][0].update(key=escape)),
        (DIGESTS, lambda d: d["sha256"].update({CONFIG: escape})),
    ):
        before = {path: path.read_bytes() for path in bundle.iterdir()}
        edit(bundle / name, change)
        if name != DIGESTS:
            sign_files(bundle)
        for command in (["show"], ["show", "--json"], ["show", "--no-verify"], ["verify"], ["verify", "--no-anchors"]):
            main(["bundle", *command, str(bundle)])
        main(["space", str(bundle), str(bundle)])
        told = capsys.readouterr()
        assert "\x1b" not in told.out + told.err, (name, change)
        for path, raw in before.items():
            Path(path).write_bytes(raw)


def test_an_answer_is_printed_as_text(stitched, tokenizer, monkeypatch, capsys):
    chatty = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    chatty.chat_template = "{{ messages[-1].content }}"
    chat = Chat(stitched("unequal", pst=True), chatty, "#2", max_new_tokens=2)
    monkeypatch.setattr(chat, "ask", lambda text: (piece for piece in ("fine ", "\x1b[2J")))
    lines = iter(["hello", "/quit"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    converse(chat)
    assert capsys.readouterr().out == "fine \\x1b[2J\n"
