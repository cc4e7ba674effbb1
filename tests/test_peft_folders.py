"""PEFT's adapter folders: an anchor's LoRA written as one, and one taken as its start."""

import json
import shutil

import pytest
import torch
from conftest import fresh, ids_like
from image_anchors import vit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_bundle import load
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from stitched_llama import PSTConfig, StitchedViTForImageClassification

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks so
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*merging LoRA weights won't be possible"),
]
IDS = ids_like(2, 9, seed=4)
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


@torch.no_grad()
def logits(model, **how):
    return model(IDS, **how).logits


def assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize(
    "settings", [PSTConfig(rank=(2, 3)), PSTConfig(rank=2, stitch_rank=3), PSTConfig(rank=2, stitch_bias=False)]
)
def test_an_anchors_lora_loads_onto_the_plain_anchor(settings, anchors, tmp_path):
    model = fresh(anchors["unequal"], settings)
    for number, folder in enumerate(anchors["unequal"]):
        model.save_adapter(number, tmp_path / str(number))
        fields = json.loads((tmp_path / str(number) / SETTINGS).read_text())
        assert fields["base_model_name_or_path"] == folder
        assert fields["lora_bias"] == (settings.stitch_bias and not settings.stitch_rank)
        tuned = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), tmp_path / str(number))
        assert_close(logits(tuned), logits(model, stitch_id=model.space.anchor_stitch(number).key))
        assert any(p.requires_grad for p in model.parameters()), "the model still trains"


def test_what_has_no_adapter_is_refused(made, bundle, anchors, tmp_path):
    merged = load(bundle, merge=True)
    images = StitchedViTForImageClassification.from_anchors([vit(16, 3), vit(24, 3)])
    for model, said in (
        (fresh(anchors["unequal"]), "anchor 1 has no LoRA"),
        (fresh(anchors["unequal"], PSTConfig(full=True)), "anchor 1 has no LoRA"),
        (fresh(anchors["unequal"], PSTConfig(rank=0)), "anchor 1 has no LoRA"),
        (merged, "PST was merged"),
        (load(bundle, stitch_id=2), "anchor 1 was not loaded whole"),
        (images, "anchor 1 is a vit: adapters are of decoders alone"),
    ):
        with pytest.raises(ValueError, match=said):
            model.save_adapter(1, tmp_path / "out")
    (tmp_path / "taken").touch()
    with pytest.raises(ValueError, match="is there already"):
        made.save_adapter(1, tmp_path / "taken")
    eight = load(bundle, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    for name, model in (("exact", made), ("eight", eight)):
        model.save_adapter(-1, tmp_path / name)
    found, wanted = (load_file(tmp_path / name / WEIGHTS) for name in ("eight", "exact"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted.keys() | found.keys())


def adapter(base, folder, **settings):
    """A trained adapter of a plain model, as PEFT saves it; returns the logits with it."""
    how = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}
    tuned = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**how | settings)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    tuned.save_pretrained(folder)
    return logits(tuned)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"r": 3, "target_modules": ["o_proj"]}])
def test_an_adapter_is_the_start_of_an_anchors_lora(settings, anchors, tmp_path):
    wanted = adapter(anchors["unequal"][1], tmp_path / "adapter", **settings)
    model = fresh(anchors["unequal"], PSTConfig(rank=3))
    key = model.space.anchor_stitch(1).key
    model.stitch_bias.vectors[key].data.zero_()
    small = logits(model, stitch_id=0)
    model.start_from_adapter(1, tmp_path / "adapter")
    assert_close(logits(model, stitch_id=key), wanted)
    assert torch.equal(logits(model, stitch_id=0), small)
    model.save_pretrained(tmp_path / "bundle")
    assert torch.equal(logits(load(tmp_path / "bundle"), stitch_id=key), logits(model, stitch_id=key))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": 9}, "rank 9, PST has 3 on anchor 1: attach PST with rank 9 or more"),
        ({"target_modules": ["up_proj"]}, "adapts model.layers.0.mlp.up_proj, which PST does not adapt"),
        ({"use_dora": True}, "use_dora=True, more than two factors"),
        ({"bias": "lora_only"}, "bias='lora_only', more than two factors"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.'lm_head'., more"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named_and_changes_nothing(change, said, anchors, tmp_path):
    adapter(anchors["unequal"][1], tmp_path, **change)
    model = fresh(anchors["unequal"], PSTConfig(rank=3))
    before = logits(model)
    with pytest.raises(ValueError, match=said):
        model.start_from_adapter(1, tmp_path)
    assert torch.equal(logits(model), before)


def test_a_damaged_adapter_is_named(anchors, tmp_path):
    adapter(anchors["unequal"][1], tmp_path / "good")
    model = fresh(anchors["unequal"], PSTConfig(rank=3))
    tensors, settings = load_file(tmp_path / "good" / WEIGHTS), json.loads((tmp_path / "good" / SETTINGS).read_text())
    first = min(tensors)
    for number, (fields, held, said) in enumerate(
        (
            (settings | {"peft_type": "IA3"}, tensors, "of type 'IA3'"),
            (settings | {"r": "2"}, tensors, "r of the adapter in .* is '2'"),
            (settings | {"init_lora_weights": "pissa"}, tensors, "init_lora_weights='pissa'"),
            (settings, {n: t for n, t in tensors.items() if n != first}, "two factors for each of its layers"),
            (settings, tensors | {"more": torch.ones(2)}, "two factors for each of its layers: more"),
            (settings, tensors | {first: tensors[first] * torch.inf}, "NaN or infinite"),
            (settings, tensors | {first: tensors[first][:, :5].clone()}, "the adapter is of another model"),
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", folder)
        (folder / SETTINGS).write_text(json.dumps(fields))
        save_file(held, folder / WEIGHTS)
        with pytest.raises(ValueError, match=said):
            model.start_from_adapter(1, folder)
    with pytest.raises(ValueError, match="the adapter is of another model"):
        model.start_from_adapter(0, tmp_path / "good")
    with pytest.raises(ValueError, match="holds no LoRA"):
        model.start_from_adapter(1, tmp_path)
