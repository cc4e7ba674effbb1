"""Bundles that are damaged, edited or half written: named and refused, or the old one whole."""

import json
import os
import shutil

import pytest
import torch
from conftest import fresh, ids_like, randomise
from safetensors.torch import save_file
from test_bundle import assert_equal, contents, load, tensors
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from stitched_llama import PSTConfig
from stitched_llama.bundles import CONFIG, TABLE, WEIGHTS, recover, staged_files, write_atomically
from stitched_llama.cli import main


@pytest.fixture(scope="module")
def original(anchors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    fresh(anchors["unequal"], PSTConfig(rank=4)).save_pretrained(folder)
    return folder


@pytest.fixture
def bundle(original, tmp_path):
    return shutil.copytree(original, tmp_path / "bundle")


def refuses(bundle, named, **how):
    """Refused as changed; and where its digests are left aside, or were written anew, by what is wrong in it."""
    with pytest.raises(ValueError, match="changed: it has SHA-256"):
        load(bundle, **how)
    with pytest.raises(ValueError, match=named) as error:
        load(bundle, verify=False, **how)
    return str(error.value)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, TABLE])
def test_missing_file_is_named(name, bundle):
    (bundle / name).unlink()
    with pytest.raises(ValueError, match=f"is not a bundle: it has no {name}"):
        load(bundle)


def test_folder_of_another_model_is_no_bundle(anchors, tmp_path):
    with pytest.raises(ValueError, match="is not a bundle: it has no stitches.json"):
        load(anchors["unequal"][0])
    with pytest.raises(OSError, match="nowhere.*neither a folder here nor a bundle on the Hub"):
        load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_truncated_weights_are_named(size, bundle):
    raw = (bundle / WEIGHTS).read_bytes()
    (bundle / WEIGHTS).write_bytes(raw[:size])
    refuses(bundle, "model.safetensors is damaged or truncated")


@pytest.mark.parametrize("name", [CONFIG, TABLE])
@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_damaged_json_is_named(name, text, bundle):
    (bundle / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    refuses(bundle, name)


@pytest.mark.parametrize(
    "part",
    ["lora_A", "lora_B", "stitching_layers.0_1_1.proj.weight", "stitching_layers.0_1_0.proj.bias", "stitch_bias"],
)
def test_missing_tensor_and_wrong_shape_are_named(part, bundle):
    found = tensors(bundle)
    name = sorted(n for n in found if part in n)[-1]
    save_file({n: t for n, t in found.items() if n != name}, bundle / WEIGHTS)
    assert name in refuses(bundle, "lacks 1 of")
    wrong = torch.zeros(*found[name].shape[:-1], found[name].shape[-1] + 1)
    save_file({**found, name: wrong}, bundle / WEIGHTS)
    error = refuses(bundle, "has shape")
    assert all(str(list(t.shape)) in error for t in (wrong, found[name]))
    assert name in error


@pytest.mark.parametrize("change", [{"kernel_size": 2}, {"stride": 2}, {"direction": "both"}, {"pairs": "any"}])
def test_edited_space_is_refused_with_both_digests(change, bundle):
    edit(bundle / CONFIG, lambda content: content.update(change))
    refuses(bundle, "was trained in space [0-9a-f]{64}, its config describes [0-9a-f]{64}")


def test_files_of_two_bundles_are_refused(bundle):
    edit(bundle / TABLE, lambda content: content.update(space_digest="0" * 64))
    refuses(bundle, "files are of two bundles")


def test_unknown_pst_settings_are_refused(bundle):
    edit(bundle / CONFIG, lambda content: content["pst"].update(surprise=1))
    refuses(bundle, "surprise")


@pytest.mark.parametrize("where", ["model.layers.2.", "lm_head", "model.norm"])
def test_a_changed_anchor_is_refused_with_both_digests(where, bundle, anchors, tmp_path):
    anchor = LlamaForCausalLM.from_pretrained(anchors["unequal"][1])
    name = next(n for n, _ in anchor.named_parameters() if n.startswith(where))
    with torch.no_grad():
        anchor.get_parameter(name).mul_(1.01)
    anchor.save_pretrained(tmp_path / "changed")
    recorded = json.loads((bundle / CONFIG).read_text())["anchors"][1]["fingerprint"]
    with pytest.raises(ValueError, match=f"anchor 1 changed: {where.rstrip('.')}") as error:
        load(bundle, anchors=[anchors["unequal"][0], str(tmp_path / "changed")])
    part = next(part for part in recorded if name.startswith(part))
    assert recorded[part] in str(error.value)
    edit(bundle / CONFIG, lambda content: content["anchors"][1].update(name_or_path=str(tmp_path / "changed")))
    refuses(bundle, "anchor 1 changed")
    assert main(["bundle", "digest", str(bundle)]) == 0
    with pytest.raises(ValueError, match="anchor 1 changed"):
        load(bundle)
    if where == "model.layers.2.":  # a size that does not need the changed block still loads
        load(bundle, stitch_id="0[0:2]>1[4:5]")
        with pytest.raises(ValueError, match="anchor 1 changed: model.layers.2 "):
            load(bundle, stitch_id="0[0:1]>1[1:5]")


def test_a_truncated_or_incomplete_anchor_is_named(bundle, anchors, tmp_path):
    folder = shutil.copytree(anchors["unequal"][1], tmp_path / "anchor")
    whole = tensors(folder)
    given = [anchors["unequal"][0], str(folder)]
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:-10])
    with pytest.raises((ValueError, OSError), match="anchor.*(truncated|damaged|incomplete)"):
        load(bundle, anchors=given)
    missing = "model.layers.4.mlp.up_proj.weight"
    save_file({n: t for n, t in whole.items() if n != missing}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=missing.rsplit(".mlp", 1)[0]):
        load(bundle, anchors=given)
    (folder / WEIGHTS).unlink()
    with pytest.raises((ValueError, OSError), match="safetensors"):
        load(bundle, anchors=given)


# ---- interrupted saves


class Killed(BaseException):
    """As if the process died: no handler of the package may catch it and go on."""


def killed_at(monkeypatch, module, name, call):
    """Lets `module.name` work until its `call`-th call, which raises."""
    original, calls = getattr(module, name), []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)
    return calls


STEPS = [("bundle.save_file", 1), ("bundle.dump_json", 1), *(("atomic._flush", n) for n in range(1, 10))]
STEPS += [("atomic.os.replace", n) for n in range(1, 7)] + [("atomic.shutil.rmtree", 1)]


@pytest.mark.parametrize(("where", "call"), STEPS, ids=[f"{where}-{call}" for where, call in STEPS])
def test_an_interrupted_save_leaves_the_old_bundle_or_the_new(where, call, bundle, tmp_path, monkeypatch):
    import stitched_llama.bundles as package

    model = load(bundle)
    old = contents(bundle)
    randomise(model, seed=9).config.default_stitch_id = 1
    model.save_pretrained(tmp_path / "wanted")
    new = contents(tmp_path / "wanted")
    *path, name = where.split(".")
    module = package
    for part in path:
        module = getattr(module, part)
    with monkeypatch.context() as patch:
        calls = killed_at(patch, module, name, call)
        with pytest.raises(Killed):
            model.save_pretrained(bundle)
    assert len(calls) == call
    again = load(bundle)
    found = contents(bundle)
    assert found in (old, new), {n: (found[n] == old.get(n), found[n] == new.get(n)) for n in found}
    after_marker = where in ("atomic.os.replace", "atomic.shutil.rmtree") or (where == "atomic._flush" and call > 8)
    assert found == (new if after_marker else old)
    if after_marker:
        assert_equal(again, model)
    model.save_pretrained(bundle)
    assert contents(bundle) == new


@pytest.mark.parametrize("done", range(7))
@pytest.mark.parametrize("loader", ["class", "auto"])
def test_a_process_killed_after_the_marker_leaves_the_new_bundle(done, loader, bundle, tmp_path):
    model = load(bundle)
    randomise(model, seed=9).config.default_stitch_id = 1
    model.save_pretrained(tmp_path / "new")
    stage = shutil.copytree(tmp_path / "new", bundle / ".staged")
    (stage / "COMPLETE").touch()
    for path in sorted(stage.iterdir())[1 : 1 + done]:  # the first is the marker
        os.replace(path, bundle / path.name)
    again = (AutoModelForCausalLM.from_pretrained if loader == "auto" else load)(bundle)
    assert contents(bundle) == contents(tmp_path / "new")
    assert_equal(again, model)
    assert torch.equal(again(ids_like(1, 5)).logits, model(ids_like(1, 5), stitch_id=1).logits)


def test_a_process_killed_before_the_marker_leaves_the_old_bundle(bundle):
    old = contents(bundle)
    (bundle / ".staged").mkdir()
    (bundle / ".staged" / WEIGHTS).write_bytes(b"half")
    model = load(bundle)
    assert contents(bundle) == old
    assert (bundle / ".staged" / WEIGHTS).exists(), "its writer may be at work: a reader must leave it alone"
    model.save_pretrained(bundle)
    assert contents(bundle) == old
    assert not (bundle / ".staged").exists()


def test_staged_files_are_all_or_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "other").write_text("kept")
    with pytest.raises(RuntimeError), staged_files(tmp_path) as stage:  # noqa: PT012
        (stage / "a").write_text("new")
        raise RuntimeError
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old", "other": "kept"}
    with staged_files(tmp_path) as stage:
        (stage / "a").write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "new", "other": "kept"}
    recover(tmp_path)
    recover(tmp_path / "none")


def test_one_file_is_written_whole_or_not_at_all(tmp_path):
    def fail(path):
        path.write_text("half")
        raise RuntimeError

    write_atomically(tmp_path / "sub" / "a", lambda path: path.write_text("old"))
    with pytest.raises(RuntimeError):
        write_atomically(tmp_path / "sub" / "a", fail)
    assert [(p.name, p.read_text()) for p in (tmp_path / "sub").iterdir()] == [("a", "old")]


def test_int8_stitching_layers_need_their_scales(bundle):
    load(bundle).save_pretrained(bundle, stitching_dtype="int8")
    whole = tensors(bundle)
    name = next(name for name in whole if name.endswith("_scale"))
    for change, named in (
        ({name: None}, f"lacks 1 of .*{name}"),
        ({name: whole[name][:1].contiguous()}, rf"{name}.*shape \[1\], this model needs \[48\]"),
        (
            {name.removesuffix("_scale"): whole[name.removesuffix("_scale")].float()},
            "float32 and stitching_dtype is 'int8'",
        ),
    ):
        save_file({n: t for n, t in {**whole, **change}.items() if t is not None}, bundle / WEIGHTS)
        refuses(bundle, named)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        (TABLE, lambda c: c.pop("stitches"), "no list of stitches"),
        (TABLE, lambda c: c.update(metric="taste"), "damaged.*'taste' is none of those measured"),
        (CONFIG, lambda c: c["anchors"][1].pop("fingerprint"), "anchor 1 has no fingerprint"),
        (CONFIG, lambda c: c.update(anchors=None), "names no anchors"),
        (CONFIG, lambda c: c["anchor_configs"][0].update(num_attention_heads=0), "num_attention_heads .* is 0"),
        (CONFIG, lambda c: c["anchor_configs"][0].update(hidden_size="wide"), "hidden_size .* is 'wide'"),
    ],
)
def test_edited_tables_are_refused_by_name(name, change, named, bundle):
    edit(bundle / name, change)
    refuses(bundle, named)


@pytest.mark.parametrize("header", ["[]", '{"w": {"dtype": "F32", "shape": [1]}}', '{"w": 3}'])
def test_damaged_header_is_named(header, bundle):
    (bundle / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"0" * 64)
    refuses(bundle, "model.safetensors is damaged or truncated")
