"""Adapters and rescaling at junctions: costs, least squares through them, training, reload, refusals."""

from itertools import cycle, product

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from image_anchors import CLASSES, FAMILIES, basic, build, convnext, lively, mobilenet, resnet, swin, vit
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, LlamaConfig, ResNetConfig, SwinConfig

import stitched_llama as sl
from stitched_llama import PSTConfig, StitchSpace
from stitched_llama.layers import Fit, StitchingLayer
from stitched_llama.space import ADAPTERS, RESCALES
from stitched_llama.space.adapters import strides_reach

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*junctions do not fit:UserWarning", "ignore:.*ridge decides:UserWarning"
)

PAIRS = {
    "resnet": (sl.StitchedResNetForImageClassification, FAMILIES["resnet"][1]),
    "swin": (sl.StitchedSwinForImageClassification, FAMILIES["swin"][1]),
    "convnext": (sl.StitchedConvNextForImageClassification, FAMILIES["convnext"][1]),
    "mobilenet": (sl.StitchedMobileNetV2ForImageClassification, FAMILIES["mobilenet"][1]),
    "resnet-swin": (sl.StitchedMixedForImageClassification, FAMILIES["resnet-swin"][1]),
    "resnet-vit": (sl.StitchedMixedForImageClassification, lambda: [basic(), vit(32, 4, size=32, patch_size=8)]),
    "mobilenet-vit": (
        sl.StitchedMixedForImageClassification,
        lambda: [mobilenet(0.1), vit(96, 6, size=32, patch_size=8)],
    ),
    "patches": (sl.StitchedViTForImageClassification, lambda: [vit(16, 3, patch_size=4), vit(24, 3, patch_size=8)]),
}


def stitched(pair, **options):
    torch.manual_seed(0)
    model_class, make = PAIRS[pair]
    anchors = [lively(anchor, seed) for seed, anchor in enumerate(make())]
    for anchor in anchors:
        anchor.config._attn_implementation = "eager"
    return model_class.from_anchors(anchors, **{"across_stages": True, **options})


def images(model, rows=2, seed=0):
    size = model.config.image_size
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))


def logits(model, pixels, key=None):
    with torch.no_grad():
        return model(pixels, stitch_id=key).logits


LAYERS = [name for name in ADAPTERS if name != "identity"]  # identity joins equal features and has no weights


def crossing(space):
    """Stitches that join stages of different resolution."""
    found = [s for s in space if s.junctions and _grids(space, s)[0] != _grids(space, s)[1]]
    assert found
    return found


def _grids(space, stitch):
    layer = space.stitching_layers[stitch.junctions[0].layer]
    return layer.in_grid, layer.out_grid


@pytest.mark.parametrize("pair", [name for name in PAIRS if name != "patches"])
@pytest.mark.parametrize("rescale", RESCALES)
def test_stages_are_crossed_at_exact_costs(pair, rescale):
    for adapter, norm in zip(LAYERS, ("none", "batch", "none", "batch")):
        model = stitched(pair, adapter=adapter, rescale=rescale, adapter_norm=norm)
        pixels = images(model, 1)
        own = sum(p.numel() for p in model.stitching_layers.parameters())
        assert own == sum(layer.params for layer in model.space.stitching_layers.values())
        for stitch in crossing(model.space):
            with FlopCounterMode(display=False) as counter:
                found = logits(model, pixels, stitch.key)
            assert found.shape == (1, CLASSES)
            assert found.isfinite().all()
            assert stitch.macs == pytest.approx(counter.get_total_flops() / 2, rel=0.01), (stitch.key, adapter)


FAST = set(zip(LAYERS, cycle(RESCALES)))  # each adapter and each rescaling once


@pytest.mark.parametrize(
    ("adapter", "rescale"),
    [pytest.param(*pair, marks=[] if pair in FAST else [pytest.mark.slow]) for pair in product(LAYERS, RESCALES)],
)
def test_every_adapter_learns_saves_and_reloads(adapter, rescale, tmp_path):
    torch.manual_seed(0)
    paths = []
    for number, anchor in enumerate([lively(swin(8, [2, 2]), 0), lively(swin(12, [2, 4]), 1)]):
        anchor.save_pretrained(tmp_path / str(number))
        paths.append(tmp_path / str(number))
    options = {"adapter": adapter, "rescale": rescale, "adapter_norm": "batch", "across_stages": True}
    model = sl.StitchedSwinForImageClassification.from_anchors(paths, **options)
    model.calibrate([{"pixel_values": images(model, 8)}], progress=False)
    pixels = images(model, 4)
    before = {stitch.key: logits(model, pixels, stitch.key) for stitch in model.space}
    settings = PSTConfig(rank=2)
    model.attach_pst(settings)
    counts = model.trainable_parameters()
    assert counts["stitching_layers"] == settings.trainable_params(model.space)["stitching_layers"]
    for key, wanted in before.items():
        assert torch.equal(logits(model, pixels, key), wanted), key
    randomise(model)
    model.train()
    for stitch in model.space:
        model.zero_grad()
        model(pixels, labels=torch.tensor([0, 1, 2, 3]), stitch_id=stitch.key).loss.backward()
        own = dict(model.stitch_parameters(stitch.key))
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(own), stitch.key
    model.eval().save_pretrained(tmp_path / "b")  # after the norms' statistics moved
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "b")
    assert again.space.options == model.space.options
    for stitch in model.space:
        assert torch.equal(logits(again, pixels, stitch.key), logits(model, pixels, stitch.key)), stitch.key
    key = crossing(model.space)[-1].key
    part = AutoModelForImageClassification.from_pretrained(tmp_path / "b", stitch_id=key)
    assert torch.equal(logits(part, pixels), logits(model, pixels, key))


@pytest.mark.parametrize("rescale", ["bilinear", "strided"])
def test_least_squares_fits_through_the_downsample(rescale):
    """Against activations caught by hooks in the plain anchors, rescaled here."""
    model = stitched("resnet", rescale=rescale)
    pixels = images(model, 24)
    junction = crossing(model.space)[-1].junctions[0]
    caught = {}
    plain = [lively(anchor, seed) for seed, anchor in enumerate((torch.manual_seed(0), PAIRS["resnet"][1]())[1])]
    names = [family.block_names(anchor) for family, anchor in zip(model.families, plain)]
    head = plain[junction.head].get_submodule(names[junction.head][junction.head_stop - 1])
    tail = plain[junction.tail].get_submodule(names[junction.tail][junction.tail_start])
    head.register_forward_hook(lambda m, args, out: caught.update(x=out))
    tail.register_forward_pre_hook(lambda m, args: caught.update(y=args[0]))
    with torch.no_grad():
        for anchor in plain:
            anchor(pixels)
    x, y = caught["x"], caught["y"]
    x = F.interpolate(x, y.shape[2:], mode="bilinear") if rescale == "bilinear" else x[:, :, ::2, ::2]
    assert x.shape[2:] == y.shape[2:] != caught["x"].shape[2:]
    rows = [f.flatten(2).transpose(1, 2).flatten(0, 1).double() for f in (x, y)]
    model.calibrate([{"pixel_values": pixels}], ridge=1e-12, progress=False)
    ones = torch.ones(len(rows[0]), 1, dtype=torch.float64)
    wanted = torch.linalg.lstsq(torch.cat([rows[0], ones], 1), rows[1]).solution
    layer = model.stitching_layers[junction.layer].core
    torch.testing.assert_close(layer.weight.double(), wanted[:-1].T, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(layer.bias.double(), wanted[-1], atol=1e-3, rtol=1e-2)


def layer(adapter, rescale="none", norm="none", special=1):
    torch.manual_seed(0)
    grids = ((4, 4), (4, 4)) if rescale == "none" else ((4, 4), (2, 2))
    made = StitchingLayer(
        6, 8, adapter, rescale, norm, *grids, special, step=2 if rescale == "strided" else 1, inner_width=2
    )
    return made.eval()


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("adapter", LAYERS)
def test_every_adapter_is_born_as_the_fit(adapter, rescale, norm):
    made = layer(adapter, rescale, norm)
    rows = torch.randn(3, 1 + 16, 6)
    moments = [torch.randn(6), torch.rand(6) + 0.1, torch.randn(8), torch.rand(8) + 0.1]
    fit = Fit(torch.randn(8, 6), torch.randn(8), *moments)
    made.init_solution(fit)
    wanted = F.linear(made.sampled(rows), fit.weight, fit.bias)
    assert wanted.shape == (3, 1 + (16 if rescale == "none" else 4), 8)
    signed = wanted.relu() if "relu" in adapter else wanted
    with torch.no_grad():
        torch.testing.assert_close(made(rows), signed, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("adapter", [name for name in LAYERS if name != "linear"])
def test_other_adapters_begin_near_the_identity(adapter):
    rows = torch.rand(2, 17, 6)
    with torch.no_grad():
        found = layer(adapter)(rows)
    assert torch.equal(found[..., :6], rows)
    assert not found[..., 6:].any()


@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("adapter", ["conv3x3_relu", "bottleneck"])
def test_adapters_are_the_convolutions_they_are_called(adapter, rescale):
    """Against plain functions on [batch, width, height, width] maps, the class token apart."""
    made = layer(adapter, rescale, special=1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    rows = torch.randn(2, 17, 6)
    step = 2 if rescale == "strided" else 1

    def by_hand(image):
        if adapter == "conv3x3_relu":
            return F.conv2d(image, made.core.weight, made.core.bias, stride=step, padding=1).relu()
        inner = F.conv2d(image, made.reduce.weight[:, :, None, None], made.reduce.bias).relu()
        inner = F.conv2d(inner, made.neighbours.weight, made.neighbours.bias, stride=step, padding=1).relu()
        branch = F.conv2d(inner, made.expand.weight[:, :, None, None], made.expand.bias)
        return F.conv2d(image, made.core.weight[:, :, None, None], made.core.bias, stride=step) + branch

    image = rows[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    if rescale == "bilinear":
        image = F.interpolate(image, (2, 2), mode="bilinear")
    with torch.no_grad():
        found = made(rows)
        wanted = by_hand(image).flatten(2).transpose(1, 2)
        token = by_hand(rows[:, 0, :, None, None]).flatten(1)
    torch.testing.assert_close(found[:, 1:], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[:, 0], token, atol=1e-4, rtol=1e-4)


def test_patches_of_other_sizes_meet_by_interpolation_and_the_class_token_is_kept():
    with pytest.raises(ValueError, match=r"4x4 places \+ 1.*2x2 places \+ 1.*rescale='bilinear'"):
        stitched("patches", across_stages=False)
    model = stitched("patches", rescale="bilinear", kernel_size=2, across_stages=False)
    assert len(model.space) == 2 + 7
    junction = model.space[4].junctions[0]
    seen = {}
    model.stitching_layers[junction.layer].register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    logits(model, images(model), 4)
    assert (seen["x"].shape[1], seen["y"].shape[1]) == (1 + 16, 1 + 4)
    made = model.stitching_layers[junction.layer]
    with torch.no_grad():
        torch.testing.assert_close(seen["y"][:, 0], F.linear(seen["x"][:, 0], made.core.weight, made.core.bias))


def real(**options):
    """The fourth paper's ResNet-50 and Swin-T at 224, from their published configs."""
    resnet50, tiny = ResNetConfig().to_dict(), SwinConfig(image_size=224).to_dict()
    return (
        StitchSpace.from_configs([resnet50, resnet50], across_stages=True, **options),
        StitchSpace.from_configs([resnet50, tiny], across_stages=True, **options, direction="both"),
    )


def test_junctions_that_do_not_downsample_explode_in_the_cost_table():
    """Traft and Cheney, figure 3: more computation than the whole original, though with fewer layers."""
    for large, small in zip(real(adapter="conv3x3_relu"), real(adapter="conv3x3_relu", rescale="bilinear")):
        original = max(large.anchor_stitch(i).macs for i in (0, 1))
        for stitch in crossing(large):
            if stitch.segments[0].anchor == 0:
                assert stitch.macs > original, stitch.key
                assert small[stitch.key].macs < stitch.macs
                assert small[stitch.key].depth < large.anchor_stitch(0).depth + large.anchor_stitch(1).depth
    within = real(adapter="bottleneck", rescale="bilinear")[0]
    assert all(stitch.macs < within.anchor_stitch(0).macs for stitch in crossing(within))


def test_junctions_of_blocks_as_wide_as_no_others_have_layers_of_their_own():
    """MobileNetV2 has blocks of two widths at one resolution; a window over both needs two stitching layers."""
    model = sl.StitchedMobileNetV2ForImageClassification.from_anchors(build("mobilenet"), kernel_size=2)
    widths = {}
    for junction in model.space.junctions:
        leaves = model.space.anchors[junction.head].leaves[junction.head_stop - 1].width
        enters = model.space.anchors[junction.tail].enters[junction.tail_start].width
        widths.setdefault(junction.layer, set()).add((leaves, enters))
    assert all(len(found) == 1 for found in widths.values())
    assert any("x" in name for name in widths)
    for stitch in model.space:
        assert logits(model, images(model), stitch.key).shape == (2, CLASSES)


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (lambda: [vit(16, 3), vit(24, 3)], {"adapter": "conv5x5"}, "adapter 'conv5x5' is unknown; one of linear, "),
        (lambda: [vit(16, 3), vit(24, 3)], {"rescale": "nearest"}, "rescale 'nearest' is unknown"),
        (lambda: [vit(16, 3), vit(24, 3)], {"adapter_norm": "layer"}, "adapter_norm 'layer' is unknown"),
        (
            lambda: [vit(16, 3, size=24), vit(24, 3, size=24, patch_size=6)],
            {"rescale": "strided"},
            r"leaves 16 channels at 6x6 places \+ 1, to block . of anchor 1, entered at 24 channels at 4x4 places \+ 1: "
            "rescale='bilinear' joins any two",
        ),
        (
            lambda: [resnet([8, 16], [2, 2], "basic"), swin(12, [2, 4], 32, 1)],
            {},
            "no junction is possible.*leave 8 channels at 8x8 places, 16 channels at 4x4 places.*entered at 12 channels at "
            "32x32 places, 24 channels at 16x16 places; nearest are 8 channels at 8x8 places and 24 channels at 16x16 places",
        ),
        (
            lambda: [vit(16, 3), vit(24, 3, num_channels=1)],
            {},
            "num_channels is 3 in anchor 0 .vit. and 1 in anchor 1",
        ),
        (
            lambda: [
                resnet([8, 16], [1, 1], "basic"),
                resnet([8, 16], [1, 2], "basic"),
                resnet([8, 16], [2, 2], "basic"),
            ],
            {"across_stages": True, "pairs": "chain"},
            "over three anchors cross stages only with rescale",
        ),
    ],
)
def test_impossible_junctions_are_refused_when_built(make, options, named):
    with pytest.raises(ValueError, match=named):
        StitchSpace.from_configs([anchor.config.to_dict() for anchor in make()], **options)


def test_a_gap_alone_makes_a_space_and_without_it_the_error_says_how():
    configs = [convnext([8, 16], [2, 2]).config.to_dict(), vit(40, 4, patch_size=8).config.to_dict()]
    with pytest.raises(ValueError, match="4x4 places.*2x2 places.*across_stages=True and rescale='bilinear'"):
        StitchSpace.from_configs(configs)
    space = StitchSpace.from_configs(configs, across_stages=True, rescale="bilinear")
    assert {s.key for s in space if s.junctions} == {"0[0:2]>1[0:4]", "0[0:4]>1[0:4]"}


@pytest.mark.parametrize("rank", [None, "full"])
@pytest.mark.parametrize("adapter", LAYERS)
def test_bfloat16_and_pst_in_float32_run_together(adapter, rank):
    torch.manual_seed(0)
    anchors = [anchor.to(torch.bfloat16) for anchor in build("swin")]
    model = sl.StitchedSwinForImageClassification.from_anchors(
        anchors, adapter=adapter, rescale="bilinear", adapter_norm="batch", across_stages=True
    )
    model.attach_pst(PSTConfig(rank=2, stitching_rank=rank))
    assert model.space.precision.dtype == "bfloat16"
    randomise(model)
    exact = sl.StitchedSwinForImageClassification.from_anchors(
        build("swin"), adapter=adapter, rescale="bilinear", adapter_norm="batch", across_stages=True
    )
    exact.attach_pst(PSTConfig(rank=2, stitching_rank=rank))
    with torch.no_grad():
        for (name, wanted), tensor in zip(model.named_parameters(), exact.parameters()):
            assert wanted.dtype == (torch.float32 if wanted.requires_grad else torch.bfloat16), name
            tensor.copy_(wanted)
    for stitch in model.space:
        pixels = images(model)
        found, wanted = logits(model, pixels, stitch.key).float(), logits(exact, pixels, stitch.key)
        torch.testing.assert_close(found, wanted, atol=0.1 * float(wanted.abs().max()), rtol=0)


def test_norms_of_frozen_adapters_keep_their_statistics():
    model = stitched("swin", adapter_norm="batch")
    model.attach_pst(PSTConfig(rank=2, stitching_rank=0))
    pixels, key = images(model, 8), crossing(model.space)[0].key
    before = logits(model, pixels, key)
    model.train()
    for _ in range(3):
        model(pixels, stitch_id=key)
    assert torch.equal(logits(model.eval(), pixels, key), before)


def test_r2_across_a_gap_is_of_what_the_tail_was_trained_for():
    """An un-rescaled map is judged after interpolation, and a map onto what it can reach exactly is perfect."""
    model = stitched("resnet")
    key = crossing(model.space)[-1].junctions[0]
    report = model.calibrate([{"pixel_values": images(model, 32, seed)} for seed in range(9)], progress=False)
    made, held_out = model.stitching_layers[key.layer], images(model, 32, 7)
    with torch.no_grad():
        x = model.block_outputs(key.head, held_out).leaves[key.head_stop - 1]
        y = model.block_outputs(key.tail, held_out).enters[key.tail_start]
        mapped = F.conv2d(x, made.core.weight[:, :, None, None], made.core.bias)
        mapped = F.interpolate(mapped, y.shape[2:], mode="bilinear")
    rows = y.transpose(0, 1).flatten(1).double()
    r2 = 1 - float((mapped - y).double().square().sum() / (rows - rows.mean(1, keepdim=True)).square().sum())
    assert report.r2[str(key)] == pytest.approx(r2, abs=1e-4)


def test_class_tokens_have_an_r2_of_their_own():
    model = stitched("patches", rescale="bilinear", across_stages=False)
    with torch.no_grad():
        for anchor in model.anchors:
            anchor.vit.embeddings.cls_token.mul_(50).add_(20)
    report = model.calibrate([{"pixel_values": images(model, 16, seed)} for seed in range(9)], progress=False)
    assert any(abs(report.r2[name] - report.r2_with_first[name]) > 0.01 for name in report.r2)


@pytest.mark.parametrize(
    ("before", "after", "reached"),
    [((9, 9), (2, 2), True), ((7, 7), (3, 3), True), ((16, 16), (3, 3), True), ((8, 8), (4, 4), True),
     ((8, 6), (4, 2), False), ((6, 6), (4, 4), False), ((8, 12), (4, 6), True)],
)  # fmt: skip
def test_strides_that_reach(before, after, reached):
    assert strides_reach(before, after) == reached


@pytest.mark.parametrize("adapter", ["linear", "conv3x3_relu", "bottleneck"])
def test_int8_bundles_hold_every_core_in_8_bits(adapter, tmp_path):
    for number, anchor in enumerate(build("swin")):
        anchor.save_pretrained(tmp_path / str(number))
    model = sl.StitchedSwinForImageClassification.from_anchors([tmp_path / "0", tmp_path / "1"], adapter=adapter)
    model.calibrate([{"pixel_values": images(model, 16)}], progress=False)
    model.save_pretrained(tmp_path / "b", stitching_dtype="int8")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    cores = [tensor for name, tensor in tensors.items() if name.endswith("proj.weight")]
    assert {tensor.dtype for tensor in cores} == {torch.int8}
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "b")
    pixels = images(model)
    for stitch in model.space:
        wanted = logits(model, pixels, stitch.key)
        torch.testing.assert_close(
            logits(again, pixels, stitch.key), wanted, atol=0.05 * float(wanted.abs().max()), rtol=0
        )


def test_a_wholly_trained_bundle_counts_and_takes_the_bytes_it_is_asked_for(tmp_path):
    for number, anchor in enumerate(build("vit")):
        anchor.save_pretrained(tmp_path / str(number))
    model = sl.StitchedViTForImageClassification.from_anchors([tmp_path / "0", tmp_path / "1"], dtype="bfloat16")
    model.attach_pst(PSTConfig(full=True))
    assert model.space.precision.dtype == "float32"
    model.save_pretrained(tmp_path / "b")
    for dtype, size in ((None, 4), (torch.bfloat16, 2)):
        one = sl.StitchedViTForImageClassification.from_pretrained(tmp_path / "b", stitch_id=1, dtype=dtype)
        stitch = one.space[1]
        assert stitch.weight_bytes == size * stitch.params
        assert {p.dtype for p in one.parameters()} == {torch.float32 if dtype is None else torch.bfloat16}


@pytest.mark.parametrize("settings", [{"rank": 4}, {"stitching_rank": 3}, {"stitch_bias": False}, {"dropout": 0.1}])
def test_settings_without_a_part_in_full_training_are_refused(settings):
    with pytest.raises(ValueError, match=f"full trains everything, {next(iter(settings))} would have no part"):
        PSTConfig(full=True, **settings)


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match="stitching_rank is 'auto': a whole number, None .* or 'full'"):
        PSTConfig(stitching_rank="auto")
    with pytest.raises(
        ValueError, match="num_labels shape anchors as they are loaded, anchor 0 is a model already: name folders or"
    ):
        sl.StitchedViTForImageClassification.from_anchors(build("vit"), num_labels=3)
    turned = vit(24, 3, id2label={i: f"class {6 - i}" for i in range(7)})
    with pytest.raises(ValueError, match="class 0 is 'class 0' in anchor 0 and 'class 6' in anchor 1; .* by id2label"):
        sl.StitchedViTForImageClassification.from_anchors([vit(16, 3), turned])
    with pytest.raises(ValueError, match="an odd number cannot be merged by two"):
        StitchSpace.from_configs([swin(8, [2, 2], 18, 2).config.to_dict(), swin(12, [2, 4], 18, 2).config.to_dict()])
    model = stitched("swin")
    with pytest.raises(ValueError, match="use_reentrant=True loses gradients"):
        model.activation_checkpointing_enable({"use_reentrant": True})


def test_adapters_are_for_images():
    text = LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32).to_dict()
    with pytest.raises(ValueError, match="adapter is for images: llama reads tokens"):
        StitchSpace.from_configs([text, text], adapter="bottleneck")


def test_full_training_of_the_stitching_layers_and_of_everything(tmp_path):
    for settings in (PSTConfig(rank=0, stitching_rank="full", stitch_bias=False), PSTConfig(full=True)):
        torch.manual_seed(0)
        paths = []
        for number, anchor in enumerate(build("swin")):
            anchor.save_pretrained(tmp_path / str(number))
            paths.append(tmp_path / str(number))
        model = sl.StitchedSwinForImageClassification.from_anchors(paths, adapter="bottleneck", kernel_size=2)
        pixels = images(model)
        before = logits(model, pixels, 3)
        model.attach_pst(settings)
        assert torch.equal(logits(model, pixels, 3), before)
        counts = model.trainable_parameters()
        assert counts["stitching_layers"] == sum(layer.params for layer in model.space.stitching_layers.values())
        assert {n: counts[n] for n in settings.trainable_params(model.space)} == settings.trainable_params(model.space)
        randomise(model)
        for stitch in model.space:
            model.zero_grad()
            model(pixels, labels=torch.tensor([0, 1]), stitch_id=stitch.key).loss.backward()
            own = {name for name, _ in model.stitch_parameters(stitch.key)}
            assert {name for name, p in model.named_parameters() if p.grad is not None} <= own, stitch.key
        model.save_pretrained(tmp_path / "b")
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "b")
        for stitch in model.space:
            assert torch.equal(logits(again, pixels, stitch.key), logits(model, pixels, stitch.key))
        part = AutoModelForImageClassification.from_pretrained(tmp_path / "b", stitch_id=3)
        assert torch.equal(logits(part, pixels), logits(model, pixels, 3))


@pytest.mark.parametrize("adapter", LAYERS)
def test_a_stitch_across_stages_exports(adapter):
    model = stitched("resnet-swin", adapter=adapter, rescale="bilinear", adapter_norm="batch")
    pixels, key = images(model), crossing(model.space)[0].key
    program = torch.export.export(model.pinned(key), (pixels,), strict=False)
    torch.testing.assert_close(program.module()(pixels).logits, logits(model, pixels, key), atol=1e-5, rtol=1e-4)
