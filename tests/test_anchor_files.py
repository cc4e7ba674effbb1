"""What lies beside an anchor's weights: tokenizers, adapters, image processors, and sizes that its config does not tell."""

import json
import logging
import runpy
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, fresh, ids_like, spread
from image_anchors import deit, dinov2, lively, vit
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    ConvNextConfig,
    DeiTImageProcessor,
    Dinov2Config,
    LlamaForCausalLM,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTImageProcessor,
)

from stitched_llama import (
    PSTConfig,
    StitchedDinov2ForImageClassification,
    StitchedLlamaForCausalLM,
    StitchedViTForImageClassification,
    StitchImageTrainer,
    StitchSpace,
    StitchTrainingArguments,
    training,
)
from stitched_llama.training import Collator, InstructionDataset, Row, batches, evaluate_stitches, pico_anchor, template

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks Transformers


@torch.no_grad()
def logits(model, inputs, **how):
    return model(inputs, **how).logits


# ---- adapters


@pytest.fixture
def with_adapter(anchors, tmp_path):
    """The small anchor's folder, copied, with an adapter in it that changes its logits."""
    folder = tmp_path / "adapted"
    shutil.copytree(anchors["unequal"][0], folder)
    tuned = get_peft_model(LlamaForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    spread(tuned.base_model)
    tuned.save_pretrained(folder)
    return str(folder)


def test_an_adapter_beside_an_anchor_is_refused_before_weights_are_read(with_adapter, anchors, tmp_path):
    plain = anchors["unequal"][0]
    attached = AutoModelForCausalLM.from_pretrained(with_adapter)
    assert not torch.equal(
        logits(attached, ids_like(1, 5)), logits(LlamaForCausalLM.from_pretrained(plain), ids_like(1, 5))
    )
    for path in tmp_path.glob("adapted/model.safetensors"):
        path.write_bytes(b"never read")
    with pytest.raises(ValueError, match=r"adapted holds an adapter \(adapter_config.json\), .*merge_and_unload"):
        StitchedLlamaForCausalLM.from_anchors([with_adapter, anchors["unequal"][1]])
    fresh(anchors["unequal"]).save_pretrained(tmp_path / "bundle")
    with pytest.raises(ValueError, match="adapted holds an adapter"):
        StitchedLlamaForCausalLM.from_pretrained(tmp_path / "bundle", anchors=[with_adapter, anchors["unequal"][1]])


def test_a_folder_of_an_adapter_alone_is_named_as_one(with_adapter, anchors, tmp_path):
    (tmp_path / "adapted" / "config.json").unlink()
    with pytest.raises(ValueError, match="adapted holds an adapter"):
        StitchedLlamaForCausalLM.from_anchors([with_adapter, anchors["unequal"][1]])


def recipe(name, monkeypatch, *arguments):
    """A recipe in this process."""
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "recipes" / name), run_name="__main__")


def test_baselines_refuse_an_adapter_too(with_adapter, monkeypatch):
    for name in ("lora_baseline.py", "vision_baseline.py"):
        with pytest.raises(ValueError, match="adapted holds an adapter"):
            recipe(name, monkeypatch, "--anchors", with_adapter, "--data", "none.json", "--use_cpu")


# ---- tokenizers and vocabularies


@pytest.mark.parametrize(
    "raw", ["{", "[]", '{"model": 3}', "[" * 100_000, '{"version": "1.0", "model": {"type": "BPE", "vocab": 1}}']
)
def test_an_unreadable_tokenizer_is_warned_of(raw, anchors, tmp_path, caplog):
    folders = [tmp_path / "small", tmp_path / "large"]
    for source, folder in zip(anchors["unequal"], folders):
        shutil.copytree(source, folder)
    (folders[1] / "tokenizer.json").write_text(raw)
    with caplog.at_level(logging.WARNING):
        StitchedLlamaForCausalLM.from_anchors(folders)
    assert f"{folders[1]} has no tokenizer that could be compared" in caplog.text


def padded(tmp_path, tokenizer, rows, names=("small", "large"), with_tokenizer=(True, True)):
    """Two LLaMAs whose embeddings have `rows` rows each, the tokenizer's pieces first."""
    folders = []
    for name, shape, vocab_size, has in zip(names, ((32, 2, 4, 2), (48, 3, 6, 3)), rows, with_tokenizer):
        folders.append(str(tmp_path / name))
        spread(pico_anchor(*shape, vocab_size=vocab_size)).save_pretrained(folders[-1])
        if has:
            tokenizer.save_pretrained(folders[-1])
    return folders


@pytest.mark.parametrize("rows", [(400, 401), (401, 400)])
def test_vocabularies_that_are_padded_differently_have_their_common_part(rows, tokenizer, tmp_path):
    folders = padded(tmp_path, tokenizer, rows)
    model, ids = fresh(folders), ids_like(2, 7)
    assert model.config.vocab_size == 400
    for number, folder in enumerate(folders):
        wanted = logits(LlamaForCausalLM.from_pretrained(folder), ids)[..., :400]
        assert torch.equal(logits(model, ids, stitch_id=model.space.anchor_stitch(number).key), wanted)
        assert model.space.anchor_stitch(number).params == LlamaForCausalLM.from_pretrained(folder).num_parameters()
    model.attach_pst(PSTConfig(rank=2))
    for stitch in model.space:
        out = model(ids, stitch_id=stitch.key, labels=ids)
        assert out.logits.shape == (2, 7, 400)
        assert out.loss.isfinite()
    assert model.generate(ids, max_new_tokens=3, stitch_id=1).shape == (2, 10)
    model.save_pretrained(tmp_path / "bundle")
    again = StitchedLlamaForCausalLM.from_pretrained(tmp_path / "bundle", stitch_id=1)
    assert torch.equal(logits(again, ids), logits(model, ids, stitch_id=1))


def test_vocabularies_that_differ_in_more_than_padding_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="vocab_size is 400 in anchor 0 .* and 500 in anchor 1"):
        fresh(padded(tmp_path / "far", tokenizer, (400, 500)))
    with pytest.raises(ValueError, match="vocab_size is 400 in one and 401 in another, and not all have a tokenizer"):
        fresh(padded(tmp_path / "bare", tokenizer, (400, 401), with_tokenizer=(True, False)))
    grown = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    grown.add_tokens([f"[{number}]" for number in range(141)])
    with pytest.raises(
        ValueError, match=r"and the rest is no padding: .* gives '\[140\]' the id 400; resize .* to 401 rows"
    ):
        fresh(padded(tmp_path / "grown", grown, (400, 401)))
    with pytest.raises(ValueError, match="piece .* has id"):  # one of them has the pieces
        fresh([*padded(tmp_path / "one", grown, (400,)), *padded(tmp_path / "two", tokenizer, (401,) * 2)[1:]])


def test_a_pad_token_beyond_the_embedding_is_named_or_never_looked_up(tokenizer, anchors):
    """Alpaca's old habit: `[PAD]` added behind the vocabulary, the embedding not resized."""
    model, prompt = fresh(anchors["unequal"]), template("short", tokenizer)
    rows = InstructionDataset([Row("a", "", "b"), Row("longer", "", "answer")], tokenizer, prompt)
    bad = Collator(model.config.vocab_size)
    said = "token id 260 is outside the 260 of the vocabulary: .* pad with another id"
    for attempt in (
        lambda: model.calibrate(batches(rows, bad, 2), progress=False),
        lambda: evaluate_stitches(model, batches(rows, bad, 2), progress=False),
        lambda: model(**bad([rows[0], rows[1]])),
        lambda: model.generate(torch.tensor([[260, 5]]), max_new_tokens=1),
    ):
        with pytest.raises(ValueError, match=said):
            attempt()


# ---- image processors


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def image_anchors(tmp_path, processors, made=(vit, deit), sizes=((16, 3), (24, 3)), **how):
    torch.manual_seed(0)
    folders, plain = [], []
    for number, (make, processor, shape) in enumerate(zip(made, processors, sizes)):
        folders.append(str(tmp_path / str(number)))
        plain.append(lively(make(*shape, **how), number))
        plain[-1].save_pretrained(folders[-1])
        if processor is not None:
            processor.save_pretrained(folders[-1])
    return folders, plain


def test_anchors_that_were_trained_on_other_pixel_values_see_their_own(tmp_path):
    side = {"height": 16, "width": 16}
    processors = [
        ViTImageProcessor(size=side),
        DeiTImageProcessor(size=side, do_center_crop=False, **IMAGENET),
    ]
    folders, plain = image_anchors(tmp_path, processors)
    model = StitchedViTForImageClassification.from_anchors(folders)
    picture = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    own = [processor(picture, return_tensors="pt")["pixel_values"] for processor in processors]
    assert not torch.allclose(own[0], own[1], atol=0.1)
    for number in (0, 1):
        found = logits(model, own[-1], stitch_id=model.space.anchor_stitch(number).key)
        torch.testing.assert_close(found, logits(plain[number], own[number]), atol=1e-5, rtol=1e-5)
    entered = model.block_outputs(0, own[-1]).enters[0]
    torch.testing.assert_close(entered, plain[0].vit.embeddings(own[0]), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "bundle")
    again = StitchedViTForImageClassification.from_pretrained(tmp_path / "bundle", stitch_id=1)
    assert torch.equal(logits(again, own[-1]), logits(model, own[-1], stitch_id=1))
    exported = torch.export.export(model.pinned(1), (own[-1],), strict=False).module()
    torch.testing.assert_close(exported(own[-1]).logits, logits(model, own[-1], stitch_id=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [{"do_normalize": False}, {"do_rescale": False, **IMAGENET}, {"rescale_factor": 1 / 127.5, **IMAGENET}],
)
def test_every_setting_of_a_processor_that_changes_numbers_counts(settings, tmp_path):
    side = {"height": 16, "width": 16}
    processors = [ViTImageProcessor(size=side, **settings), ViTImageProcessor(size=side)]
    folders, plain = image_anchors(tmp_path, processors, (vit, vit))
    model = StitchedViTForImageClassification.from_anchors(folders)
    picture = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    own = [processor(picture, return_tensors="pt")["pixel_values"].float() for processor in processors]
    embedded = model.block_outputs(0, own[1]).enters[0]
    torch.testing.assert_close(embedded, plain[0].vit.embeddings(own[0]), atol=1e-3, rtol=1e-4)


def test_processors_that_agree_or_are_missing_change_nothing(tmp_path, caplog):
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    folders, plain = image_anchors(tmp_path / "two", [processor, processor], (vit, vit))
    pixels = torch.randn(2, 3, 16, 16)
    model = StitchedViTForImageClassification.from_anchors(folders)
    assert model._normalized_for(0, pixels) is pixels
    bare, _ = image_anchors(tmp_path / "none", [None, None], (vit, vit))
    assert StitchedViTForImageClassification.from_anchors(bare).config.normalization is None
    assert "image processor" not in caplog.text
    one, _ = image_anchors(tmp_path / "one", [None, processor], (vit, vit))
    assert StitchedViTForImageClassification.from_anchors(one)._normalized_for(0, pixels) is pixels
    assert "anchor 0 has no image processor" in caplog.text


def test_a_teacher_of_other_pixel_values_is_refused(tmp_path):
    side = {"height": 16, "width": 16}
    processors = [ViTImageProcessor(size=side), ViTImageProcessor(size=side)]
    folders, _ = image_anchors(tmp_path, processors, (vit, vit))
    DeiTImageProcessor(size=side, do_center_crop=False, **IMAGENET).save_pretrained(tmp_path / "teacher")
    lively(vit(24, 3), 9).save_pretrained(tmp_path / "teacher")
    model = StitchedViTForImageClassification.from_anchors(folders)
    model.attach_pst(PSTConfig(rank=2))
    from transformers import ViTForImageClassification

    teacher = ViTForImageClassification.from_pretrained(tmp_path / "teacher")
    arguments = StitchTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="teacher takes images normalised by .*0.485.*, the stitched model by .*0.5"):
        StitchImageTrainer(model=model, args=arguments, train_dataset=[], teacher=teacher)


def test_each_baseline_sees_pictures_as_its_own_processor_gives_them(tmp_path, monkeypatch):
    side = {"height": 16, "width": 16}
    processors = [ViTImageProcessor(size=side), DeiTImageProcessor(size=side, do_center_crop=False, **IMAGENET)]
    folders, _ = image_anchors(tmp_path, processors)
    rng = np.random.default_rng(0)
    data = {"x": rng.integers(0, 256, (14, 16, 16, 3), np.uint8), "y": np.arange(14) % 7}
    np.savez(
        tmp_path / "d.npz", **{f"{name}_{part}": array for name, array in data.items() for part in ("train", "test")}
    )
    seen, made = [], training.ImageSet
    monkeypatch.setattr(
        training, "ImageSet", lambda *args, **how: seen.append(args[1].image_mean[0]) or made(*args, **how)
    )
    recipe(
        "vision_baseline.py", monkeypatch, "--anchors", *folders, "--data", tmp_path / "d.npz", "--max_steps", 1, "--use_cpu",
        "--report_to", "none", "--save_strategy", "no", "--output_dir", tmp_path, "--rows", tmp_path / "rows.json", "--save",
        tmp_path / "tuned", "--rank", 2, "--global_batch_size", 4, "--per_device_train_batch_size", 4, "--disable_tqdm", True,
    )  # fmt: skip
    assert seen == [0.5, 0.5, 0.485, 0.485]
    model = StitchedViTForImageClassification.from_anchors([tmp_path / "tuned" / "0", tmp_path / "tuned" / "1"])
    assert [scale["mean"][0] for scale in model.config.normalization] == pytest.approx([0.5, 0.485])


@pytest.mark.filterwarnings("ignore:.*junctions do not fit:UserWarning", "ignore:.*ridge decides:UserWarning")
@pytest.mark.parametrize("kind", ["grey", "dinov2"])
def test_the_recipe_runs_on_grey_anchors_and_at_another_size(kind, tmp_path, monkeypatch):
    grey = kind == "grey"
    how = {"image_mean": [0.5], "image_std": [0.5]} if grey else {}
    side = 16 if grey else 8  # DINOv2's config says 16
    processor = ViTImageProcessor(size={"height": side, "width": side}, **how)
    make, fields = (vit, {"num_channels": 1}) if grey else (dinov2, {})
    folders, _ = image_anchors(tmp_path, [processor] * 2, (make, make), **fields)
    x, y = np.random.default_rng(0).integers(0, 256, (14, 16, 16), np.uint8), np.arange(14) % 7
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    command = [
        "finetune_vision.py", monkeypatch, "--anchors", *folders, "--data", tmp_path / "d.npz", "--max_steps", 1, "--use_cpu",
        "--report_to", "none", "--save_strategy", "no", "--output_dir", tmp_path / "out", "--rank", 2, "--global_batch_size", 4,
        "--per_device_train_batch_size", 4, "--disable_tqdm", True, "--kernel_size", 1,
    ]  # fmt: skip
    if not grey:
        with pytest.raises(ValueError, match=r"these anchors take \[3, 16, 16\]: .* from_anchors\(..., image_size=8\)"):
            recipe(*command)
        command += ["--image_size", 8]
    hostile = shutil.copytree(folders[0], tmp_path / "hostile")
    config = json.loads((hostile / "config.json").read_text())
    for change, named in (
        ({"num_labels": 10**8, "id2label": None}, "num_labels"),
        ({"attn_implementation": "x/y"}, "attn_"),
    ):
        (hostile / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=f"{named}.* of the config.json of anchor"):
            recipe(*command[:3], hostile, *command[4:])
    recipe(*command)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "bundle")
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "out" / "bundle", use_fast=False)(
        Image.fromarray(x[0]).convert("L" if grey else "RGB"), return_tensors="pt"
    )["pixel_values"]
    assert list(pixels.shape) == [1, 1 if grey else 3, side, side]
    assert logits(model, pixels).shape == (1, 7)


def test_grey_anchors_run_on_grey_images(tmp_path):
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5])
    folders, plain = image_anchors(tmp_path, [processor] * 2, (vit, vit), num_channels=1)
    model, pixels = StitchedViTForImageClassification.from_anchors(folders), torch.randn(2, 1, 16, 16)
    assert torch.allclose(logits(model, pixels), logits(plain[1], pixels), atol=1e-5)
    with pytest.raises(ValueError, match=r"\[3, 16, 16\], these anchors take \[1, 16, 16\]: prepare"):
        model(torch.randn(2, 3, 16, 16))


# ---- images of another size than the config says


@pytest.mark.filterwarnings("ignore:.*junctions do not fit:UserWarning")
def test_dinov2_runs_at_the_size_of_its_processor_with_interpolated_positions(tmp_path):
    """DINOv2's configs say 518, its processors give 224."""
    folders, plain = image_anchors(tmp_path, [None, None], (dinov2, dinov2), ((16, 3), (24, 3)))
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))  # configs say 16
    with pytest.raises(
        ValueError, match=r"\[3, 8, 8\], these anchors take \[3, 16, 16\]: .* from_anchors\(..., image_size=8\)"
    ):
        StitchedDinov2ForImageClassification.from_anchors(folders)(pixels)
    model = StitchedDinov2ForImageClassification.from_anchors(folders, image_size=8)
    assert model.config.image_size == 8
    for anchor in model.anchors:
        anchor.config._attn_implementation = "eager"
    for number in (0, 1):
        stitch = model.space.anchor_stitch(number)
        assert torch.allclose(logits(model, pixels, stitch_id=stitch.key), logits(plain[number], pixels), atol=1e-5)
        assert stitch.params == plain[number].num_parameters()
    for stitch in model.space:
        with FlopCounterMode(display=False) as counter:
            logits(model, pixels[:1], stitch_id=stitch.key)
        assert stitch.macs == pytest.approx(counter.get_total_flops() / 2, rel=0.01), stitch.key
    model.calibrate([{"pixel_values": torch.randn(4, 3, 8, 8)} for _ in range(9)], progress=False)
    model.save_pretrained(tmp_path / "bundle")
    again = StitchedDinov2ForImageClassification.from_pretrained(tmp_path / "bundle")
    assert again.space.digest == model.space.digest != StitchSpace.from_configs(folders).digest
    assert torch.allclose(logits(again, pixels, stitch_id=1), logits(model, pixels, stitch_id=1), atol=1e-5)


def test_sizes_count_for_families_that_take_any_and_are_refused_for_others():
    def costs(config, size=None):
        small, large = (StitchSpace.from_configs([config, config], size).anchors[0] for size in (None, size))
        return small.params, large.params, large.blocks[0].macs / small.blocks[0].macs

    labels = {"id2label": {i: str(i) for i in range(10)}}
    for config, growth in (
        (ConvNextConfig(**labels), 4.0), (ResNetConfig(**labels), 4.0), (Dinov2Config(image_size=518, **labels), None),
    ):  # fmt: skip
        before, after, factor = costs(config, 448)
        assert before == after
        assert growth is None or factor == pytest.approx(growth)
    for config in (ViTConfig(**labels), SwinConfig(**labels)):
        assert costs(config, 224)[2] == 1
        with pytest.raises(ValueError, match="runs at the image_size it was trained at, 224, and 448 is asked for"):
            costs(config, 448)
