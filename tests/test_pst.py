"""PST by declaration: ranks that fit, what trains, precision and quantisation of what it is attached to."""

import pytest
import torch
from conftest import fresh, ids_like, randomise
from test_model import logits, saved
from transformers import BitsAndBytesConfig, MobileNetV2Config, SwinConfig

from stitched_llama import PSTConfig, StitchedLlamaForCausalLM, StitchSpace
from stitched_llama.pst import attach_pst


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank": 33}, r"rank of anchor 0 is 33, the width it adapts is 16"),
        ({"rank": (4, 99)}, r"rank of anchor 1 is 99, the width it adapts is 36"),
        ({"rank": (4, 4, 4)}, r"3 ranks \(4, 4, 4\) for 2 anchors"),
        ({"rank": -1}, "rank of anchor 0 is -1"),
        ({"stitching_rank": 33}, "stitching_rank of layer 0_1_0 is 33, the width it adapts is 32"),
    ],
)
def test_a_rank_that_does_not_fit_is_named(settings, named, anchors):
    model = fresh(anchors["unequal"])
    with pytest.raises(ValueError, match=named):
        model.attach_pst(PSTConfig(**settings))
    model.attach_pst(PSTConfig(rank=2))  # nothing was half attached
    with pytest.raises(ValueError, match="PST is attached already"):
        model.attach_pst(PSTConfig(rank=2))


def test_a_layer_into_a_tail_narrower_than_a_quarter_has_a_default_rank():
    configs = [MobileNetV2Config(image_size=224), SwinConfig(image_size=224)]
    space = StitchSpace.from_configs(configs, direction="both")
    ranks = PSTConfig().stitching_ranks(space)
    widths = {name: (layer.in_width, layer.out_width) for name, layer in space.stitching_layers.items()}
    assert any(out_width < in_width // 4 for in_width, out_width in widths.values())
    assert ranks == {name: min(in_width // 4, out_width) for name, (in_width, out_width) in widths.items()}


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, {"lora", "stitching_layers", "stitch_bias"}),
        ({"rank": (2, 5), "stitching_rank": 1}, {"lora", "stitching_layers", "stitch_bias"}),
        ({"rank": 0}, {"stitching_layers", "stitch_bias"}),
        ({"stitching_rank": 0}, {"lora", "stitch_bias"}),
        ({"stitch_bias": False}, {"lora", "stitching_layers"}),
        ({"full": True}, {"anchors", "stitching_layers"}),
    ],
)
def test_what_trains_is_what_is_declared(settings, parts, anchors, capsys):
    model = fresh(anchors["unequal"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    settings = PSTConfig(**settings)
    model.attach_pst(settings)
    counts = model.trainable_parameters()
    assert {name for name, count in counts.items() if count} == parts
    assert counts == settings.trainable_params(model.space)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert PSTConfig.from_dict(model.config.pst) == settings
    model.print_trainable_parameters()
    told = capsys.readouterr().out
    assert f"trainable params: {sum(counts.values()):,} " in told
    assert f"|| all params: {sum(p.numel() for p in model.parameters()):,} ||" in told
    if settings.full:
        assert told.endswith("trainable: 100.0000 %\n")


def test_biases_lie_where_the_route_begins(anchors):
    model = fresh(anchors["unequal"])
    alone, none = ["1[0:5]"], torch.nn.ModuleDict()  # an anchor alone has no stitching layer
    bias, _ = attach_pst(model.anchors.to("meta"), none, model.space, PSTConfig(rank=0), alone)
    assert {parameter.device.type for parameter in bias.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_anchors_run_and_pst_stays_float32(dtype, anchors):
    model = fresh(anchors["unequal"], PSTConfig(rank=2), dtype=dtype)
    exact = fresh(anchors["unequal"], PSTConfig(rank=2))
    for stitch in model.space:
        found = logits(model, stitch_id=stitch.key)
        assert found.dtype == dtype
        assert found.isfinite().all()
        if stitch.is_anchor:
            assert (
                torch.nn.functional.cosine_similarity(found.float(), logits(exact, stitch_id=stitch.key), dim=-1).min()
                > 0.98
            )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.filterwarnings("ignore:.*junctions do not fit:UserWarning")
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_anchors_run_calibrate_and_reload(bits, tmp_path):
    settings = BitsAndBytesConfig(load_in_8bit=True)
    if bits == 4:
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    folders = [saved(tmp_path / str(n), width=64 * n, depth=n + 1) for n in (1, 2)]  # 4 bits need blocks of 64
    model, exact = fresh(folders, quantization_config=settings), fresh(folders)
    for key in ("0[0:2]", "1[0:3]"):
        alike = torch.nn.functional.cosine_similarity(
            logits(model, stitch_id=key), logits(exact, stitch_id=key), dim=-1
        )
        assert 0.5 < alike.mean() < 0.99999, "are the anchors quantised at all?"
    report = model.calibrate([{"input_ids": ids_like(4, 20)}], progress=False)
    assert all(value == value for value in [*report.r2.values(), *report.loss.values()])
    before = {key: logits(model, stitch_id=key) for key in model.keys}
    with pytest.raises(ValueError, match="quantised anchors cannot train whole"):
        model.attach_pst(PSTConfig(full=True))
    model.attach_pst(PSTConfig(rank=2))
    assert all(torch.equal(logits(model, stitch_id=key), before[key]) for key in model.keys)
    key = next(stitch.key for stitch in model.space if not stitch.is_anchor)
    randomise(model).save_pretrained(tmp_path)
    again = StitchedLlamaForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    part = StitchedLlamaForCausalLM.from_pretrained(tmp_path, quantization_config=settings, stitch_id=key)
    assert torch.equal(logits(part), logits(model, stitch_id=key))
    for key in model.keys:
        assert torch.equal(logits(again, stitch_id=key), logits(model, stitch_id=key)), key
