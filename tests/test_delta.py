"""Differences of a shrunk model to the cut it started from: right, or refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_shrink import large

from stitched_llama.bundles import sha256
from stitched_llama.shrinking import ShrinkDistillation, cut_model, load_delta, save_delta, save_shrunk
from stitched_llama.shrinking.delta import DELTA, RECORD


def made_delta(folder):
    teacher = large()
    cut = cut_model(teacher, 3)
    for parameter in cut.model.model.layers.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    save_shrunk(ShrinkDistillation(cut.model, teacher, cut.target_blocks), folder / "small", "large")
    save_delta(cut.model, teacher, folder)
    return teacher, cut.model


def test_a_delta_to_another_model_or_that_changed_is_refused(tmp_path):
    teacher, small = made_delta(tmp_path)
    wanted = load_delta(teacher, tmp_path).state_dict()
    other = large()
    other.model.layers[4].mlp.up_proj.weight.data[3, 5] += 1e-3
    with pytest.raises(ValueError, match="cut to 3 blocks, have SHA-256 .*: give the model it was cut from"):
        load_delta(other, tmp_path)
    off = large()
    off.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-3  # a block that the cut leaves out
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in load_delta(off, tmp_path).state_dict().items())
    files = {name: (tmp_path / name).read_bytes() for name in (DELTA, RECORD)}
    raw = bytearray(files[DELTA])
    raw[-1] ^= 1
    record = json.loads(files[RECORD])
    for name, content, message in (
        (DELTA, bytes(raw), "delta.safetensors changed: it has SHA-256"),
        (DELTA, files[DELTA][:-9], "delta.safetensors changed"),
        (RECORD, b"{", "delta.json is not JSON"),
        (RECORD, b"[]", "delta.json holds a list"),
        (
            RECORD,
            json.dumps({"shrunk_from": record["shrunk_from"]}).encode(),
            "has no cut_sha256: .* older than digests",
        ),
        *(
            (RECORD, json.dumps(record | {"shrunk_from": lineage}).encode(), message)
            for lineage, message in (
                (None, "delta.json: it has no shrunk_from"),
                (3, "delta.json: shrunk_from of the config is 3"),
                ({"depth": 5, "target_blocks": 3}, "delta.json: shrunk_from"),
                ({"depth": 5, "target_blocks": [1, 4]}, "have SHA-256"),
                ({"depth": 5, "target_blocks": [0, 1, 4]}, "not cut in this way: target_blocks"),
                ({"depth": 10**9, "target_blocks": [10**9 - 1]}, "the model has 5 blocks"),
                (record["shrunk_from"] | {"shared": 3}, "shared in shrunk_from of the config is 3"),
            )
        ),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_delta(teacher, tmp_path)
        (tmp_path / name).write_bytes(files[name])
    small.model.embed_tokens.weight.data[3, 5] += 1
    with pytest.raises(ValueError, match="shares model.embed_tokens.weight .* and has another"):
        save_delta(small, teacher, tmp_path)
    small.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match="up_proj.weight of the small model holds 1 of"):
        save_delta(small, teacher, tmp_path)
    assert files == {name: (tmp_path / name).read_bytes() for name in (DELTA, RECORD)}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in load_delta(teacher, tmp_path).state_dict().items())


NORM, WEIGHT = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
SCALES = f"{WEIGHT}.scales"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(SCALES), f"lacks scales .*, the first is {SCALES}"),
        (lambda t: t.update({"x.scales": torch.zeros(3)}), "has some of nothing, the first is x.scales"),
        (lambda t: t.update({NORM: torch.ones(1).half()}), f"{NORM} of .* is torch.float16 .1., the model's .48. need"),
        (lambda t: t.update({SCALES: t[SCALES].float()}), f"{SCALES} of .* is torch.float32"),
        (lambda t: t.update({WEIGHT: t[WEIGHT].long()}), f"{WEIGHT} of .* is torch.int64"),
        (lambda t: t.update({WEIGHT: t[WEIGHT][:-1]}), f"{WEIGHT} of .* is torch.uint8"),
        (lambda t: t[SCALES].fill_(float("nan")), f"tensor {SCALES} of .* entries that are NaN"),
        (lambda t: t.pop(NORM), "differ in model.norm.weight: they do not belong together"),
        (lambda t: t.update({"x": torch.zeros(3)}), "differ in x: they do not belong together"),
    ],
)
def test_what_digests_of_a_delta_written_anew_cannot_hide_is_refused_too(change, message, tmp_path):
    teacher, _ = made_delta(tmp_path)
    tensors = load_file(tmp_path / DELTA)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / DELTA)
    record = json.loads((tmp_path / RECORD).read_text()) | {"delta_sha256": sha256(tmp_path / DELTA)}
    (tmp_path / RECORD).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        load_delta(teacher, tmp_path)
