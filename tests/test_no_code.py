"""No code of a bundle or an anchor runs, and no secret of a command line is written."""

import ast
import builtins
import json
import pickle
import shutil
import sys

import pytest
from conftest import ROOT, fresh, with_table
from test_bundle import load
from test_damage import edit
from test_hostile import set_field, sign
from tiny_runs import trainer
from transformers import AutoConfig, AutoModelForCausalLM

from stitched_llama import PSTConfig, StitchedLlamaForCausalLM
from stitched_llama.bundles import CONFIG
from stitched_llama.cli import main
from stitched_llama.training import StitchTrainingArguments, provenance, redacted

EVIL = """
import pathlib
pathlib.Path({marker!r}).touch()
class Evil:
    pass
"""


@pytest.fixture
def bundle(anchors, tmp_path):
    with_table(fresh(anchors["unequal"], PSTConfig(rank=2))).save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


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
    """In the package, the recipes, the benchmarks and the demo: a call without the argument may ask a person, and run code."""
    found = 0
    for path in [
        p for room in ("stitched_llama", "recipes", "benchmarks", "data", "demo") for p in (ROOT / room).rglob("*.py")
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


# ---- secrets


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
