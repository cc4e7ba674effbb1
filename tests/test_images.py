"""Stitched image classifiers: every family equals its plain models, learns, saves, reloads and refuses bad input."""

import json

import pytest
import torch
from conftest import randomise
from image_anchors import CLASSES, FAMILIES, LABELS, build, vit
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BitsAndBytesConfig,
    ResNetConfig,
    ViTConfig,
    ViTImageProcessor,
    pipeline,
)

from stitched_llama import PSTConfig, StitchedViTConfig, StitchedViTForImageClassification, StitchSpace
from stitched_llama.models.route import junction_rows
from stitched_llama.training import evaluate_stitches

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*junctions do not fit:UserWarning", "ignore:.*ridge decides:UserWarning"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("images"), {}

    def get(family):
        if family not in made:
            made[family] = []
            for number, anchor in enumerate(build(family)):
                path = root / f"{family}{number}"
                anchor.save_pretrained(path)
                made[family].append(str(path))
        return made[family]

    return get


def stitched(folders, family, pst=None, **how):
    torch.manual_seed(0)
    model_class, _, options = FAMILIES[family]
    model = model_class.from_anchors(folders(family), **options, **how)
    if pst is not None:
        model.attach_pst(pst)
        randomise(model)
    return model


def images(model, rows=3, seed=0):
    size = model.config.image_size
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))


def logits(model, pixels, key):
    with torch.no_grad():
        return model(pixels, stitch_id=key).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_anchors_equal_their_plain_models_and_pst_is_born_neutral(family, folders):
    model = stitched(folders, family)
    pixels = images(model)
    for number, anchor in enumerate(build(family)):
        with torch.no_grad():
            wanted = anchor(pixels).logits
        torch.testing.assert_close(
            logits(model, pixels, model.space.anchor_stitch(number).key), wanted, atol=1e-5, rtol=0
        )
    before = {stitch.key: logits(model, pixels, stitch.key) for stitch in model.space}
    assert len(before) > len(model.anchors)
    model.attach_pst(PSTConfig(rank=2))
    for key, wanted in before.items():
        assert torch.equal(logits(model, pixels, key), wanted), key


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_equal_numel_and_a_flop_counter(family, folders):
    model = stitched(folders, family)
    for anchor in model.anchors:
        anchor.config._attn_implementation = "eager"
    pixels, ran = images(model, 1), set()
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: ran.update(module.parameters(recurse=False)))
    for number, anchor in enumerate(model.anchors):
        assert model.space.anchor_stitch(number).params == anchor.num_parameters()
    for stitch in model.space:
        ran.clear()
        with FlopCounterMode(display=False) as counter:
            logits(model, pixels, stitch.key)
        assert stitch.params == sum(parameter.numel() for parameter in ran), stitch.key
        assert stitch.macs == pytest.approx(counter.get_total_flops() / 2, rel=0.01), stitch.key
        assert "kv_bytes_per_token" not in stitch.to_dict()
        assert stitch.to_dict()["macs_per_image"] == stitch.macs


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stitch_learns_saves_and_reloads(family, folders, tmp_path):
    model = stitched(folders, family, PSTConfig(rank=2)).train()
    pixels, labels = images(model), torch.tensor([0, 3, CLASSES - 1])
    statistics = {name: tensor.clone() for name, tensor in model.anchors.named_buffers()}
    for stitch in model.space:
        model.zero_grad()
        model(pixels, labels=labels, stitch_id=stitch.key).loss.backward()
        own = dict(model.stitch_parameters(stitch.key))
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(own), stitch.key
        assert all(p.grad.abs().sum() > 0 for name, p in own.items() if "lora_A" in name)
    for name, tensor in model.anchors.named_buffers():
        assert torch.equal(tensor, statistics[name]), f"{name} of a frozen anchor moved"
    model.eval().save_pretrained(tmp_path / "b")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "b")
    assert type(again) is type(model)
    for stitch in model.space:
        assert torch.equal(logits(again, pixels, stitch.key), logits(model, pixels, stitch.key)), stitch.key
    again.save_pretrained(tmp_path / "c")
    for name in ("config.json", "model.safetensors", "stitches.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes(), name
    key = model.space[len(model.space) // 2].key
    part = type(model).from_pretrained(tmp_path / "b", stitch_id=key)
    assert part.keys == [key]
    assert torch.equal(logits(part, pixels, None), logits(model, pixels, key))
    assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in model.parameters())


def residuals(model, batches):
    """layer -> mean squared distance of what its core gives from what enters the tail, over all its junctions."""
    errors = {}
    for batch in batches:
        outputs = [model.block_outputs(index, **batch) for index in range(len(model.anchors))]
        for junction in model.space.junctions:
            x = junction_rows(
                model.families, model.space.anchors, junction, outputs[junction.head].leaves[junction.head_stop - 1]
            )
            y = junction_rows(
                model.families,
                model.space.anchors,
                junction,
                outputs[junction.tail].enters[junction.tail_start],
                tail=True,
            )
            core = model.stitching_layers[junction.layer].core
            errors.setdefault(junction.layer, []).append(float((core(x) - y).square().mean()))
    return {name: sum(values) / len(values) for name, values in errors.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_lowers_the_residual_of_every_layer(family, folders):
    model = stitched(folders, family)
    batches = [{"pixel_values": images(model, 16, seed)} for seed in range(9)]
    report = model.calibrate(batches, progress=False)
    assert set(report.r2) == {str(junction) for junction in model.space.junctions}
    assert report.loss == {}
    fitted, before = residuals(model, batches), residuals(stitched(folders, family), batches)
    assert fitted.keys() == before.keys() == model.stitching_layers.keys()
    for name, layer in model.stitching_layers.items():
        assert fitted[name] < before[name], name
        layer.core.bias.data += 0.01
    moved = residuals(model, batches)
    assert all(moved[name] > fitted[name] for name in fitted), "not a minimum"
    labelled = [{**batch, "labels": torch.zeros(16, dtype=torch.long)} for batch in batches]
    assert set(model.calibrate(labelled, progress=False).loss) == {s.key for s in model.space}


@pytest.mark.parametrize("family", ["vit", "swin", "convnext", "resnet"])
def test_calibrated_junctions_are_least_squares_on_what_the_plain_models_hold(family, folders):
    """Against hidden activations caught by hooks in the plain anchors, not through this package's walk."""
    model = FAMILIES[family][0].from_anchors(folders(family), kernel_size=1)
    served = [junction.layer for junction in model.space.junctions]
    junction = next(j for j in model.space.junctions if j.tail_start > 0 and served.count(j.layer) == 1)
    pixels = images(model, 24)
    caught = {}
    anchors = build(family)
    for end, anchor, name in (
        (
            "x",
            anchors[junction.head],
            model.families[junction.head].block_names(anchors[junction.head])[junction.head_stop - 1],
        ),
        (
            "y",
            anchors[junction.tail],
            model.families[junction.tail].block_names(anchors[junction.tail])[junction.tail_start],
        ),
    ):
        block = anchor.get_submodule(name)
        if end == "x":
            block.register_forward_hook(lambda m, args, out: caught.update(x=out[0] if isinstance(out, tuple) else out))
        else:
            block.register_forward_pre_hook(lambda m, args: caught.update(y=args[0]))
        with torch.no_grad():
            anchor(pixels)
    rows = {
        end: (f.flatten(2).transpose(1, 2) if f.ndim == 4 else f).flatten(0, 1).double() for end, f in caught.items()
    }
    model.calibrate([{"pixel_values": pixels}], ridge=1e-12, progress=False)
    ones = torch.ones(len(rows["x"]), 1, dtype=torch.float64)
    wanted = torch.linalg.lstsq(torch.cat([rows["x"], ones], 1), rows["y"]).solution
    layer = model.stitching_layers[junction.layer].core
    torch.testing.assert_close(layer.weight.double(), wanted[:-1].T, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(layer.bias.double(), wanted[-1], atol=1e-3, rtol=1e-2)


def test_checkpoints_of_older_tensor_names_load(tmp_path):
    """As the ViTs on the Hub were saved before Transformers 5 renamed their parts."""
    changes = (
        ("vit.layers.", "vit.encoder.layer."), (".attention.q_proj", ".attention.attention.query"),
        (".attention.k_proj", ".attention.attention.key"), (".attention.v_proj", ".attention.attention.value"),
        (".attention.o_proj", ".attention.output.dense"), (".mlp.fc1", ".intermediate.dense"),
        (".mlp.fc2", ".output.dense"),
    )  # fmt: skip
    paths, plain = [], build("vit")
    for number, anchor in enumerate(plain):
        path = tmp_path / str(number)
        anchor.save_pretrained(path)
        renamed = {}
        for name, tensor in load_file(path / "model.safetensors").items():
            for new, old in changes:
                name = name.replace(new, old)
            renamed[name] = tensor
        assert "vit.encoder.layer.0.attention.attention.query.weight" in renamed
        save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
        paths.append(str(path))
    model = StitchedViTForImageClassification.from_anchors(paths)
    pixels = images(model)
    for number, anchor in enumerate(plain):
        with torch.no_grad():
            wanted = anchor(pixels).logits
        assert torch.equal(logits(model, pixels, model.space.anchor_stitch(number).key), wanted)
    model.save_pretrained(tmp_path / "b")
    part = StitchedViTForImageClassification.from_pretrained(tmp_path / "b", stitch_id=1)
    assert torch.equal(logits(part, pixels, None), logits(model, pixels, 1))


def test_a_new_head_trains_and_lies_in_the_bundle(folders, tmp_path):
    model = stitched(folders, "vit", num_labels=3)
    model.attach_pst(PSTConfig(rank=2))
    assert model.config.num_labels == 3
    assert model.trainable_parameters()["heads"] == 3 * (16 + 24) + 2 * 3
    randomise(model)
    model.save_pretrained(tmp_path / "b")
    again = StitchedViTForImageClassification.from_pretrained(tmp_path / "b")
    pixels = images(model)
    for stitch in model.space:
        found = logits(again, pixels, stitch.key)
        assert found.shape == (3, 3)
        assert torch.equal(found, logits(model, pixels, stitch.key))
    frozen = stitched(folders, "vit")
    frozen.config.train_head = False
    frozen.attach_pst(PSTConfig(rank=2))
    assert "heads" not in frozen.trainable_parameters()


def test_a_new_head_is_kept_before_pst_too_and_its_classes_stay(folders, tmp_path):
    model = stitched(folders, "vit", num_labels=3)
    model.save_pretrained(tmp_path / "b")
    again, pixels = StitchedViTForImageClassification.from_pretrained(tmp_path / "b"), images(model)
    for stitch in model.space:
        assert torch.equal(logits(again, pixels, stitch.key), logits(model, pixels, stitch.key))
    for loader in (StitchedViTForImageClassification, AutoModelForImageClassification):
        with pytest.raises(ValueError, match=r"9 labels are asked for, the heads of .* have 3: make a model of your"):
            loader.from_pretrained(tmp_path / "b", num_labels=9)


def test_a_bundle_without_the_anchors_own_heads_loads(folders, tmp_path):
    """As they were once saved before PST."""
    model = stitched(folders, "vit")
    model.config.train_head = False
    model.save_pretrained(tmp_path / "b")
    older = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(older | {"train_head": True}))
    again = StitchedViTForImageClassification.from_pretrained(tmp_path / "b", verify=False)
    pixels = images(model)
    assert torch.equal(logits(again, pixels, 1), logits(model, pixels, 1))


@pytest.mark.parametrize("pst", [False, True])
def test_anchors_in_8_bits_keep_their_heads_as_they_are(pst, folders, tmp_path):
    settings = BitsAndBytesConfig(load_in_8bit=True)
    model = StitchedViTForImageClassification.from_anchors(folders("vit"), num_labels=3, quantization_config=settings)
    if pst:
        model.attach_pst(PSTConfig(rank=2))
        randomise(model)
        assert model.trainable_parameters()["heads"]
    model.save_pretrained(tmp_path / "b")
    again = StitchedViTForImageClassification.from_pretrained(tmp_path / "b", quantization_config=settings)
    pixels = images(model)
    for stitch in model.space:
        torch.testing.assert_close(logits(again, pixels, stitch.key), logits(model, pixels, stitch.key))
    assert settings.llm_int8_skip_modules is None  # the caller's own


def test_anchors_that_name_the_same_classes_otherwise_are_joined_by_id2label(folders, tmp_path):
    paths = folders("vit")
    other = build("vit")[1]
    other.config.id2label = {i: f"the class {i}" for i in range(CLASSES)}
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="say so by id2label"):
        StitchedViTForImageClassification.from_anchors([paths[0], tmp_path])
    named = {i: f"kind {i}" for i in range(CLASSES)}
    model = StitchedViTForImageClassification.from_anchors([paths[0], tmp_path], id2label=named)
    assert model.config.id2label == named
    pixels = images(model)
    with torch.no_grad():
        wanted = other(pixels).logits
    assert torch.equal(logits(model, pixels, model.space.anchor_stitch(1).key), wanted)  # its head is kept


def test_the_card_of_an_image_bundle_is_for_images(folders, tmp_path):
    stitched(folders, "vit").save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "AutoModelForCausalLM" not in card
    lines = card.split("```python\n")[1].split("```")[0].replace("this/bundle", str(tmp_path)).splitlines()
    assert len(lines) == 6
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    scope = {"image": Image.new("RGB", (16, 16))}
    exec("\n".join(lines), scope)  # as a reader would
    assert scope["model"].keys


def test_bad_images_and_labels_are_named(folders):
    model = stitched(folders, "vit")
    with pytest.raises(ValueError, match=r"\[3, 20, 16\], these anchors take \[3, 16, 16\]"):
        model(torch.zeros(1, 3, 20, 16))
    with pytest.raises(ValueError, match=r"\[1, 16, 16\], these anchors take"):
        model(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match=f"label {CLASSES} is outside the {CLASSES} classes"):
        model(images(model, 2), labels=torch.tensor([0, CLASSES]))
    with pytest.raises(ValueError, match="no budget: pass stitch_id="):
        model(images(model), budget="1M")
    wrong = [{"pixel_values": images(model, 2), "labels": torch.tensor([0, CLASSES])}]
    with pytest.raises(ValueError, match=f"label {CLASSES} is outside the {CLASSES} classes"):
        evaluate_stitches(model, wrong, progress=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_refuses_pictures_of_another_shape(family, folders):
    model = stitched(folders, family)
    side = model.config.image_size
    for shape in ((3, 2 * side, 2 * side), (1, side, side)):
        with pytest.raises(
            ValueError, match=rf"\[{shape[0]}, {shape[1]}, {shape[2]}\], these anchors take \[3, {side}, {side}\]"
        ):
            model.calibrate([{"pixel_values": torch.zeros(2, *shape)}], progress=False)
    with pytest.raises(TypeError, match=r"unknown arguments \['output_hidden_states', 'stich_id'\]"):
        model(images(model), stich_id=0, output_hidden_states=True)
    with pytest.raises(TypeError, match=r"unknown arguments \['mask'\]"):
        model(images(model), mask=torch.ones(2))
    model(images(model), output_attentions=False, return_dict=True)


def test_anchors_that_cannot_be_joined_are_refused_when_built(tmp_path):
    vit(16, 3).save_pretrained(tmp_path / "a")
    for name, other, named in (
        ("patch", vit(24, 3, patch_size=8), r"no junction is possible.*16 channels at 4x4 places.*24 channels at 2x2"),
        ("size", vit(24, 3, size=32), "image_size is 16 in anchor 0 .* and 32 in anchor 1"),
        ("labels", vit(24, 3, id2label={0: "a", 1: "b"}), f"num_labels is {CLASSES} .* and 2 .* new head"),
    ):
        other.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=named):
            StitchedViTForImageClassification.from_anchors([str(tmp_path / "a"), str(tmp_path / name)])


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_runs(family, folders):
    model = stitched(folders, family, dtype=torch.bfloat16)
    exact = stitched(folders, family)
    model.attach_pst(PSTConfig(rank=2))
    for stitch in model.space:
        if stitch.is_anchor:
            found = logits(model, images(model), stitch.key).float()
            torch.testing.assert_close(found, logits(exact, images(model), stitch.key), atol=0.1, rtol=0.1)
        else:
            assert logits(model, images(model), stitch.key).isfinite().all()


# ---- spaces from configs alone

TI, S, B = (ViTConfig(hidden_size=w, num_attention_heads=w // 64, intermediate_size=4 * w, id2label={i: str(i) for i in range(1000)}) for w in (192, 384, 768))  # fmt: skip


def test_the_papers_vision_space():
    """71 and 732 stitches, 118.4 M, 1.3 to 17.6 G multiply-accumulates, 4.07, 1.52, 1.53, 1.77 M."""
    configs = [config.to_dict() for config in (TI, S, B)]
    space = StitchSpace.from_configs(configs, kernel_size=2)
    assert (len(space), len(space.stitching_layers)) == (71, 22)
    assert len(StitchSpace.from_configs(configs, kernel_size=2, pairs="chain")) == 732
    layers = sum(layer.params for layer in space.stitching_layers.values())
    assert round(layers / 1e6, 2) == 4.07
    assert round((layers + sum(anchor.params for anchor in space.anchors)) / 1e6, 1) == 118.4
    macs = [space.anchor_stitch(number).macs / 1e9 for number in range(3)]
    assert (round(macs[0], 1), round(macs[2], 1)) == (1.3, 17.6)
    counts = PSTConfig(rank=(32, 16, 8)).trainable_params(space)
    assert round(counts["lora"] / 1e6, 2) == 1.77
    assert round(counts["stitching_layers"] / 1e6, 2) == 1.52
    routes = sum(4 * width * 12 for width in (192, 384, 768))
    assert round((counts["stitch_bias"] - routes) / 1e6, 2) == 1.53  # over the 68 routes, anchors left out


def test_configuration_and_auto_config_agree(folders, tmp_path):
    made = StitchedViTConfig.from_anchor_configs(folders("vit"), kernel_size=2)
    made.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.stitch_space().digest == made.space_digest
    assert (again.num_labels, again.image_size) == (CLASSES, 16)
    assert again.id2label == LABELS["id2label"]


def test_resnet_takes_its_image_size_from_the_others():
    resnet = ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic").to_dict()
    resnet.pop("image_size", None)
    swin = {"model_type": "swin", "image_size": 384, "window_size": 12}
    space = StitchSpace.from_configs([resnet, swin])
    assert space.anchors[0].contract["image_size"] == 384
    assert space.anchors[0].leaves[0].grid == (96, 96)
    assert len(space) > 2


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("three", "deit") else [])  # their blocks are vit's
        for name in FAMILIES
    ],
)
def test_any_stitch_exports(family, folders):
    model = stitched(folders, family, PSTConfig(rank=2))

    class Logits(torch.nn.Module):
        def __init__(self, key):
            super().__init__()
            self.view = model.pinned(key)

        def forward(self, pixels):
            return self.view(pixels).logits

    pixels = images(model)
    for key in (model.space[1].key, model.space[len(model.space) - 2].key):
        exported = torch.export.export(Logits(key).eval(), (pixels,), strict=False).module()
        torch.testing.assert_close(exported(pixels), logits(model, pixels, key), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["vit", "dinov2", "swin", "convnext", "resnet", "mobilenet", "resnet-swin"])
def test_activation_checkpointing_computes_blocks_again_and_changes_no_gradient(family, folders):
    model = stitched(folders, family, PSTConfig(rank=2)).train()
    pixels, labels, calls = images(model), torch.tensor([0, 1, 2]), []
    for anchor in range(len(model.anchors)):
        for block in model.blocks(anchor):
            next(iter(block.children())).register_forward_hook(lambda *_: calls.append(1))
    for stitch in model.space:
        found = []
        for enabled in (False, True):
            if enabled:
                model.activation_checkpointing_enable()
            model.zero_grad()
            calls.clear()
            model(pixels, labels=labels, stitch_id=stitch.key).loss.backward()
            assert len(calls) == stitch.depth * (2 if enabled else 1)
            model.activation_checkpointing_disable()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=0)


def test_command_shows_and_verifies_an_image_bundle(folders, tmp_path, capsys):
    from stitched_llama.cli import main

    model = stitched(folders, "swin", PSTConfig(rank=2))
    model.save_pretrained(tmp_path)
    assert main(["bundle", "show", str(tmp_path)]) == 0
    assert main(["bundle", "verify", str(tmp_path), "--anchors", *folders("swin")]) == 0
    assert f"all tensors of {len(model.space)} stitches there" in capsys.readouterr().out
    assert main(["space", *folders("swin"), "--kernel-size", "2"]) == 0
    assert "MACs/image" in capsys.readouterr().out
    assert main(["bundle", "verify", str(tmp_path), "--anchors", *folders("vit")]) == 2


def test_pipeline_at_a_chosen_stitch(folders, tmp_path):
    model = stitched(folders, "vit", PSTConfig(rank=2))
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    picture = Image.new("RGB", (40, 30), (200, 10, 90))
    answers = []
    for number in (1, len(model.space) - 1):
        classify = pipeline("image-classification", model=str(tmp_path), model_kwargs={"stitch_id": number})
        assert classify.model.keys == [model.space[number].key]
        found = {answer["label"]: answer["score"] for answer in classify(picture, top_k=CLASSES)}
        pixels = classify.image_processor(picture, return_tensors="pt")["pixel_values"]
        wanted = logits(model, pixels, model.space[number].key).softmax(-1)[0]
        assert found == pytest.approx({f"class {i}": float(p) for i, p in enumerate(wanted)}, abs=1e-5)
        answers.append(found)
    assert answers[0] != answers[1]
