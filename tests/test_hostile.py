"""What comes from others: no code of theirs runs, no size of theirs is believed, no control character of theirs is printed."""

import ast
import builtins
import json
import logging
import pickle
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, fresh, with_table
from image_anchors import build
from test_bundle import load
from test_damage import edit
from tiny_runs import trainer
from transformers import AutoConfig, AutoModelForCausalLM

from stitched_llama import PSTConfig, StitchedLlamaForCausalLM, StitchedViTForImageClassification, StitchSpace
from stitched_llama.bundles import CONFIG, DIGESTS, GENERATION, TABLE
from stitched_llama.cli import main
from stitched_llama.cli.chat import Chat, converse
from stitched_llama.space import anchor_spec, intervals, printable
from stitched_llama.training import StitchTrainingArguments, provenance, redacted

EVIL = """
import pathlib
pathlib.Path({marker!r}).touch()
class Evil:
    pass
"""


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


# ---- code


@pytest.fixture
def nobody_asked(monkeypatch):
    def asked(*args):
        raise AssertionError(f"asked on stdin: {args}")

    monkeypatch.setattr(builtins, "input", asked)


def plant(folder, tmp_path, **fields):
    """Puts code, and fields that name it, into a folder; returns what the code would leave behind."""
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    classes = (
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForImageClassification",
        "AutoImageProcessor",
    )
    edit(folder / CONFIG, lambda c: c.update(auto_map=dict.fromkeys(classes, "evil.Evil"), **fields))
    return marker


@pytest.mark.parametrize("fields", [{}, {"model_type": "evil"}], ids=["known", "unknown"])
def test_code_of_an_anchor_is_not_run(fields, nobody_asked, anchors, bundle, tmp_path, capsys):
    own = [shutil.copytree(folder, tmp_path / str(n)) for n, folder in enumerate(anchors["unequal"])]
    marker = plant(own[1], tmp_path, **fields)
    paths = [str(folder) for folder in own]
    for use in (
        lambda: StitchedLlamaForCausalLM.from_anchors(paths),
        lambda: load(bundle, anchors=paths),
        lambda: load(bundle, anchors=paths, stitch_id=1),
        lambda: AutoModelForCausalLM.from_pretrained(bundle, anchors=paths, trust_remote_code=False),
    ):
        if fields:
            with pytest.raises(ValueError, match="model_type 'evil' is not supported"):
                use()
        else:
            use()
    assert main(["space", *paths]) == (2 if fields else 0)
    assert not marker.exists()


def test_only_anchors_that_the_caller_names_may_be_trusted(nobody_asked, anchors, bundle, tmp_path, monkeypatch):
    told, original = [], AutoConfig.from_pretrained

    def recorded(name, trust_remote_code=None, **how):
        told.append(trust_remote_code)
        return original(name, trust_remote_code=False, **how)

    monkeypatch.setattr("stitched_llama.models.references.AutoConfig.from_pretrained", recorded)
    own = shutil.copytree(anchors["unequal"][1], tmp_path / "1")
    marker = plant(own, tmp_path)
    edit(bundle / CONFIG, set_field("anchors", 1, "name_or_path", value=str(own)))
    sign(bundle)
    named = [anchors["unequal"][0], str(own)]
    for use, trusted in (
        (lambda: load(bundle), False),
        (lambda: load(bundle, trust_remote_code=True), False),  # the bundle's choice of anchors is not the caller's
        (lambda: load(bundle, anchors=named), False),
        (lambda: load(bundle, anchors=named, trust_remote_code=True), True),
        (lambda: StitchedLlamaForCausalLM.from_anchors(anchors["unequal"], trust_remote_code=True), True),
    ):
        told.clear()
        use()
        assert set(told) == {trusted}
    assert not marker.exists()


def test_code_of_a_bundle_is_not_run(nobody_asked, bundle, tokenizer, tmp_path, capsys, monkeypatch):
    marker = plant(bundle, tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(bundle)
    settings = bundle / "tokenizer_config.json"
    edit(settings, lambda c: c.update(auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="EvilTokenizer"))
    edit(bundle / CONFIG, set_field("model_type", value="stitched_llama"))
    sign(bundle)
    load(bundle)
    AutoModelForCausalLM.from_pretrained(bundle)
    AutoConfig.from_pretrained(bundle)
    assert main(["bundle", "verify", str(bundle)]) == 0
    monkeypatch.setattr("stitched_llama.cli.chat.converse", lambda chat: None)
    assert main(["chat", str(bundle), "--max-new-tokens", "2"]) in (0, 2)
    assert not marker.exists()


@pytest.mark.parametrize("where", [(), ("anchor_configs", 1)])
@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["someone/kernels", "flash_attention_2", {"": "someone/kernels"}])
def test_attention_of_a_bundle_names_no_kernel(where, name, value, bundle):
    edit(bundle / CONFIG, set_field(*where, name, value=value))
    sign(bundle)
    with pytest.raises(ValueError, match=f"{name} of .* which may be code from elsewhere: pass attn_implementation"):
        load(bundle)


def test_attention_of_an_anchor_names_no_kernel_but_where_the_caller_chose(anchors, tmp_path):
    own = shutil.copytree(anchors["unequal"][1], tmp_path / "1")
    edit(own / CONFIG, lambda c: c.update(attn_implementation="someone/kernels"))
    with pytest.raises(ValueError, match="attn_implementation of the config.json of anchor .* is 'someone/kernels'"):
        StitchedLlamaForCausalLM.from_anchors([anchors["unequal"][0], str(own)])
    model = StitchedLlamaForCausalLM.from_anchors([anchors["unequal"][0], str(own)], attn_implementation="eager")
    assert model.anchors[1].config._attn_implementation == "eager"


def test_every_auto_class_is_told_whether_to_trust():
    """In the package, the recipes and the benchmarks: a call without the argument may ask a person, and run code."""
    found = 0
    for path in [
        p for room in ("stitched_llama", "recipes", "benchmarks", "data") for p in (ROOT / room).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "from_pretrained"
            ):
                continue
            owner = ast.unparse(node.func.value)
            if owner.startswith("Auto") or owner.endswith("auto_class()"):
                found += 1
                said = {keyword.arg for keyword in node.keywords}
                assert said & {"trust_remote_code", None}, f"{path}:{node.lineno}: {owner} is not told"
    assert found > 10


# ---- secrets and terminals


def test_secrets_of_a_command_line_are_hidden(monkeypatch):
    token = "hf_" + "aB3" * 8
    line = [
        "--hub_token",
        token,
        f"--hub-token={token}",
        "--hub_tok",
        "short",
        "--api_key",
        "k1",
        "--password=p",
        "--data",
        "x",
    ]
    line += [
        "--data",
        f"https://me:{token}@host/x",
        f"Authorization: {token}",
        "--average_tokens_across_devices",
        "true",
    ]
    shown = " ".join(redacted(line))
    assert not any(secret in shown for secret in (token, "short", "k1", "=p", "me:"))
    assert "--data x" in shown
    assert "--average_tokens_across_devices true" in shown
    monkeypatch.setattr(sys, "argv", ["run.py", *line])
    assert token not in json.dumps(provenance())


def test_no_file_of_a_run_holds_the_token(anchors, tmp_path):
    token = "hf_" + "aB3" * 8
    made = trainer(
        fresh(anchors["unequal"], PSTConfig(rank=2)), tmp_path / "run", hub_token=token, max_steps=1, save_strategy="steps",
        save_steps=1, report_to="tensorboard",
    )  # fmt: skip
    assert made.args.hub_token == token
    made.train()
    made.save_model(str(tmp_path / "run" / "last"))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert any("tfevents" in path.name for path in files)
    assert not [path for path in files if token.encode() in path.read_bytes()]
    arguments = StitchTrainingArguments(str(tmp_path), hub_token=token, use_cpu=True, report_to="none")
    assert token.encode() not in pickle.dumps(arguments)


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
    monkeypatch.setattr(chat, "ask", lambda text: iter(["fine ", "\x1b[2J"]))
    lines = iter(["hello", "/quit"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    converse(chat)
    assert capsys.readouterr().out == "fine \\x1b[2J\n"
