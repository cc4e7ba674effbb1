"""Pictures in, bundle out: reading, few shots, the image trainer and its recipe."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, python
from image_anchors import build, vit
from PIL import Image, ImageFile
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainerState, ViTImageProcessor

from stitched_llama import (
    PSTConfig,
    StitchedViTForImageClassification,
    StitchImageTrainer,
    StitchSpace,
    StitchTrainingArguments,
)
from stitched_llama.training import (
    IMAGE_TASKS,
    EpochOfAugmentation,
    ImageSet,
    ImageTrainingArguments,
    collate_images,
    evaluate_stitches,
    few_shot,
    image_scores,
    read_images,
    some_of,
)

COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]])


def pictures(count, seed):
    """Noisy squares whose colour is their class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(COLOURS)
    noise = rng.integers(-25, 25, (count, 16, 16, 3))
    return (COLOURS[labels][:, None, None] + noise).astype(np.uint8), labels


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "colours.npz"
    (x, y), (x_test, y_test) = pictures(48, 0), pictures(30, 1)
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test, class_names=np.array(["red", "green", "blue"]))
    return path


@pytest.fixture(scope="module")
def anchors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anchors")
    torch.manual_seed(0)
    for number, width in enumerate((16, 24)):
        vit(width, 3).save_pretrained(folder / str(number))
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / str(number))
    return [str(folder / "0"), str(folder / "1")]


def test_npz_and_folder_hold_the_same_pictures(colours, tmp_path):
    images = read_images(str(colours))
    assert list(images.names) == ["red", "green", "blue"]
    assert (len(images.pictures), images.labels[:4]) == (48, [0, 1, 2, 0])
    for number, (picture, label) in enumerate(zip(images.pictures, images.labels)):
        folder = tmp_path / "train" / images.names[label]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{number:03}.png")
    again = read_images(str(tmp_path), names=images.names)
    assert sorted(again.labels) == sorted(images.labels)
    assert np.array_equal(np.asarray(again.pictures[0]), np.asarray(images.pictures[0]))
    assert read_images(str(tmp_path)).names == ["blue", "green", "red"]  # by itself a folder's names are sorted


def folder_of(path, **counts):
    """`class=count` folders of pictures."""
    for number, (name, count) in enumerate(counts.items()):
        (path / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (4, 4), (number, i, len(path.name))).save(path / name / f"{i:02}.png")


def test_parts_of_a_folder_share_their_classes(tmp_path):
    folder_of(tmp_path / "train", ant=2, bee=2, cat=2)
    folder_of(tmp_path / "val", ant=1, cat=1)
    both = read_images(str(tmp_path), "train+val")
    assert (both.names, both.labels) == (["ant", "bee", "cat"], [0, 0, 1, 1, 2, 2, 0, 2])
    folder_of(tmp_path / "test", dog=1)
    with pytest.raises(ValueError, match="test/dog is none of the classes ant, bee, cat"):
        read_images(str(tmp_path), "test", both.names)
    with pytest.raises(ValueError, match="has no folder 'held': it holds test, train, val"):
        read_images(str(tmp_path), "held")


def test_a_folder_without_parts_is_never_judged_by_what_it_trains_on(tmp_path):
    folder_of(tmp_path, ant=10, bee=7)
    train, test = (read_images(str(tmp_path), part) for part in ("train", "test"))
    assert (train.labels, test.labels) == ([0] * 8 + [1] * 6, [0, 0, 1])
    seen = [{np.asarray(picture).tobytes() for picture in part.pictures} for part in (train, test)]
    assert not seen[0] & seen[1]
    with pytest.raises(ValueError, match="has no folder 'val': it holds ant, bee"):
        read_images(str(tmp_path), "val")


def test_hidden_files_are_passed_over_and_empty_classes_named(tmp_path):
    folder_of(tmp_path / "train", ant=2, bee=2)
    (tmp_path / "train" / "ant" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "train" / ".cache").mkdir()
    assert read_images(str(tmp_path)).labels == [0, 0, 1, 1]
    (tmp_path / "train" / "eel").mkdir()
    with pytest.raises(ValueError, match="train/eel would be a class and holds no pictures"):
        read_images(str(tmp_path))


def test_a_part_to_evaluate_on_is_drawn_from_all_classes(colours):
    images = read_images(str(colours), "test")
    ordered = type(images)(images.pictures, sorted(images.labels), images.names)  # class by class, as folders are read
    some = some_of(ordered, 12, 0)
    assert len(some.labels) == 12
    assert set(some.labels) == {0, 1, 2}
    assert some_of(ordered, 12, 0).labels == some.labels
    with pytest.raises(ValueError, match="-3 of 30 held-out rows are asked for"):
        some_of(ordered, -3, 0)
    assert some_of(ordered, 0, 0).labels == some_of(ordered, 99, 0).labels == ordered.labels


def test_bad_pictures_are_named(colours, tmp_path):
    with pytest.raises(ValueError, match="has no x_val and y_val: it holds x_train"):
        read_images(str(colours), "val")
    with pytest.raises(ValueError, match="there is no file .*none.npz"):
        read_images(str(tmp_path / "none.npz"))
    with pytest.raises(ValueError, match="label 2 is outside the 2 classes"):
        read_images(str(colours), names=["red", "green"])
    np.savez(tmp_path / "float.npz", x_train=np.zeros((2, 4, 4, 3)), y_train=np.zeros(2))
    with pytest.raises(ValueError, match=r"x_train is float64 \[2, 4, 4, 3\]"):
        read_images(str(tmp_path / "float.npz"))
    (tmp_path / "f" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no pictures"):
        read_images(str(tmp_path / "f"))
    (tmp_path / "f" / "cat" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png is no picture"):
        read_images(str(tmp_path / "f"))
    with pytest.raises(ValueError, match="'someone/nothing' is neither a .npz, a folder, one of cifar100, .* nor"):
        read_images("someone/nothing")
    assert all(id.count("/") == 1 for id, _ in IMAGE_TASKS.values())


def test_a_task_is_read_from_the_hub_by_name(monkeypatch):
    import datasets

    asked, pixels = [], np.arange(2 * 6 * 6 * 3, dtype=np.uint8).reshape(2, 6, 6, 3)
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["cat", "dog"])})
    table = datasets.Dataset.from_dict(
        {"img": [Image.fromarray(p) for p in pixels], "fine_label": [1, 0]}, features=features
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **how: asked.append((args, how)) or table)
    images = read_images("cifar100", "train+test")
    assert asked == [((*IMAGE_TASKS["cifar100"],), {"split": part}) for part in ("train", "test")]
    assert (images.names, images.labels) == (["cat", "dog"], [1, 0, 1, 0])
    assert np.array_equal(np.asarray(images.pictures[2]), pixels[0])
    other = table.rename_column("img", "sound")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **how: other)
    with pytest.raises(
        ValueError, match=r"me/set, train has the columns \['sound', 'fine_label'\]: an image and a label"
    ):
        read_images("me/set")


def test_few_shots_are_equal_a_class_and_follow_the_seed(colours):
    images = read_images(str(colours))
    one, again, other = few_shot(images, 4, 0), few_shot(images, 4, 0), few_shot(images, 4, 1)
    assert sorted(one.labels) == [0] * 4 + [1] * 4 + [2] * 4
    same = [np.array_equal(a, b) for a, b in zip(one.pictures, again.pictures)]
    assert all(same)
    assert not all(np.array_equal(a, b) for a, b in zip(one.pictures, other.pictures))
    with pytest.raises(ValueError, match="class 'red' has 16 pictures, 17 shots"):
        few_shot(images, 17, 0)


def test_pictures_are_chosen_before_any_is_opened(tmp_path, monkeypatch):
    folder_of(tmp_path / "train", ant=10, bee=10)
    folder_of(tmp_path / "val", ant=10, bee=10)
    (tmp_path / "train" / "ant" / "cut.png").write_bytes((tmp_path / "train" / "ant" / "00.png").read_bytes()[:50])
    opened, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: opened.append(self) or load(self))
    images = read_images(str(tmp_path), "train+val")
    few, some = few_shot(images, 2, 0), some_of(images, 5, 0)
    assert not opened
    assert (len(images.pictures), len(few.pictures), len(some.pictures)) == (41, 4, 5)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    assert ImageSet(few, processor).pixels.shape == (4, 3, 16, 16)
    assert len({id(picture) for picture in opened}) <= 4 + 1
    with pytest.raises(ValueError, match=r"cut\.png is no picture that can be opened"):
        list(images.pictures)


def test_augmentation_moves_pictures_and_keeps_what_they_are_made_of():
    picture = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    images = type("Images", (), {"pictures": [picture], "labels": [1]})
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    plain, moved = ImageSet(images, processor), ImageSet(images, processor, augment=True)
    seen = []
    for epoch in range(8):
        moved.epoch = epoch
        seen.append(moved[0]["pixel_values"])
        assert torch.equal(moved[0]["pixel_values"], seen[-1])  # nothing but seed, epoch and picture decides
    assert len({tensor.sum().item() for tensor in seen}) > 2
    assert all(set(tensor.unique().tolist()) <= set(plain[0]["pixel_values"].unique().tolist()) for tensor in seen)
    assert torch.equal(plain[0]["pixel_values"], plain[0]["pixel_values"])


def test_pictures_too_many_to_keep_are_prepared_at_every_visit(colours):
    images, processor = read_images(str(colours)), ViTImageProcessor(size={"height": 16, "width": 16})
    kept, fetched = ImageSet(images, processor), ImageSet(images, processor, keep_bytes=48 * 3 * 16 * 16 * 4 - 1)
    assert fetched.pixels is None
    assert all(torch.equal(kept[i]["pixel_values"], fetched[i]["pixel_values"]) for i in range(48))


@pytest.mark.filterwarnings("ignore:.*ridge decides:UserWarning")
def test_resume_sees_the_same_augmented_pictures(colours, anchors, tmp_path):
    images, processor = read_images(str(colours)), ViTImageProcessor(size={"height": 16, "width": 16})
    found = []
    for resume in (None, str(tmp_path / "checkpoint-4")):  # in the middle of an epoch of three steps
        torch.manual_seed(0)
        model = StitchedViTForImageClassification.from_anchors(anchors, kernel_size=2, num_labels=3)
        model.attach_pst(PSTConfig(rank=4))
        args = StitchTrainingArguments(
            output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=16, global_batch_size=16, seed=1,
            learning_rate=1e-2, use_cpu=True, save_steps=4, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        train_set = ImageSet(images, processor, augment=True, seed=1)
        run = StitchImageTrainer(model=model, args=args, train_dataset=train_set, data_collator=collate_images)
        run.train(resume_from_checkpoint=resume)
        assert train_set.epoch == 2  # of three steps each
        found.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_workers_that_outlive_an_epoch_augment_anew(colours):
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    train_set = ImageSet(read_images(str(colours)), processor, augment=True)
    loader = torch.utils.data.DataLoader(train_set, batch_size=48, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in (0, 1, 0):
        EpochOfAugmentation().on_epoch_begin(None, TrainerState(epoch=float(epoch)), None, train_dataloader=loader)
        seen.append(next(iter(loader))["pixel_values"])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_image_scores():
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    losses, counts, right = image_scores(logits, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(losses, torch.log1p(torch.exp(torch.tensor([-2.0, -3.0, 1.0]))))
    assert (counts.tolist(), right.tolist()) == ([1.0, 1.0, 1.0], [True, True, False])


@pytest.mark.filterwarnings("ignore:.*ridge decides:UserWarning")
def test_every_stitch_learns_colours_and_accumulation_changes_nothing(colours, anchors, tmp_path):
    images, processor = read_images(str(colours)), ViTImageProcessor(size={"height": 16, "width": 16})
    train_set = ImageSet(images, processor)
    test_set = ImageSet(read_images(str(colours), "test"), processor)
    found = []
    for size in (16, 4):
        torch.manual_seed(0)
        model = StitchedViTForImageClassification.from_anchors(anchors, kernel_size=2, num_labels=3)
        model.calibrate([{"pixel_values": train_set.pixels[:24]}], progress=False)
        model.attach_pst(PSTConfig(rank=4))
        args = StitchTrainingArguments(
            output_dir=str(tmp_path), max_steps=60, per_device_train_batch_size=size, global_batch_size=16,
            learning_rate=1e-2, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, warmup_steps=0,
            dataloader_pin_memory=False,
        )  # fmt: skip
        StitchImageTrainer(model=model, args=args, train_dataset=train_set, data_collator=collate_images).train()
        found.append(
            evaluate_stitches(model, [collate_images([test_set[i] for i in range(len(test_set))])], progress=False)
        )
    assert set(found[0]) == {"loss", "accuracy"}
    assert min(found[0]["accuracy"].values()) > 0.9
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=0.05, abs=1e-3)


def test_vision_recipe_leaves_bundle_plot_table_and_row(colours, anchors, tmp_path):
    done = python(
        "recipes/finetune_vision.py", "--anchors", *anchors, "--data", colours, "--output_dir", tmp_path, "--max_steps", 8,
        "--shots", 8, "--rank", 4, 2, "--use_cpu", "--report_to", "none", "--global_batch_size", 8,
        "--per_device_train_batch_size", 8, "--dtype", "float32",
    )  # fmt: skip
    row = json.loads((tmp_path / "result.json").read_text())
    assert (row["classes"], row["shots"], row["train_images"], row["held_out_images"]) == (3, 8, 24, 30)
    assert row["trainable"]["heads"] == 3 * (16 + 24) + 6
    assert {"loss", "accuracy"} <= set(row["table"]["stitches"][0]["metrics"])
    assert (tmp_path / "stitches.png").stat().st_size > 10_000
    assert "accuracy" in done.stdout
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "bundle")
    assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}
    assert [s.key for s in model.published]


def test_a_wrong_number_of_ranks_is_told_before_anything_is_read(anchors):
    done = python(
        "recipes/vision_baseline.py",
        "--anchors",
        *anchors,
        "--data",
        "none.npz",
        "--rank",
        2,
        2,
        2,
        "--use_cpu",
        check=False,
    )
    assert "3 ranks for 2 anchors" in done.stderr


def test_the_rate_follows_the_whole_batch_and_both_recipes_have_one_set_of_defaults():
    for options in ({"global_batch_size": 32}, {"global_batch_size": 0, "gradient_accumulation_steps": 4}):
        made = ImageTrainingArguments(per_device_train_batch_size=8, base_lr=1e-3, use_cpu=True, **options)
        assert made.learning_rate == pytest.approx(1e-3 * 32 / 256)
        assert replace(made, save_strategy="no").learning_rate == made.learning_rate
    with pytest.raises(ValueError, match="pass --base_lr"):
        ImageTrainingArguments(learning_rate=0.1, use_cpu=True)
    for name in ("finetune_vision", "vision_baseline"):
        assert "ImageTrainingArguments" in (ROOT / "recipes" / f"{name}.py").read_text()


def test_vision_recipe_refuses_a_rate_it_would_not_use(colours, anchors, tmp_path):
    command = (
        "recipes/finetune_vision.py",
        "--anchors",
        *anchors,
        "--data",
        colours,
        "--output_dir",
        tmp_path,
        "--use_cpu",
    )
    done = python(*command, "--learning_rate", "0.1", check=False)
    assert done.returncode != 0
    assert "pass --base_lr" in done.stderr


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_real_pictures_are_read():
    images = read_images(str(SHARED / "data" / "images" / "cifar10" / "cifar10.npz"))
    assert (len(images.pictures), len(images.names)) == (800, 10)
    assert images.pictures[0].size == (32, 32)


def test_the_vision_demos_halves_are_disjoint_and_its_vits_fit_them(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "data"))
    import make_vits

    arrays = make_vits.digits(0)
    assert len(arrays["x_train"]) + len(arrays["x_test"]) == 1797
    assert arrays["x_train"].dtype == np.uint8
    assert arrays["x_train"].max() == 240
    halves = [{picture.tobytes() for picture in arrays[f"x_{part}"]} for part in ("train", "test")]
    assert not halves[0] & halves[1]
    assert np.array_equal(make_vits.digits(0)["y_train"], arrays["y_train"])
    space = StitchSpace.from_configs([make_vits.vit(width).config.to_dict() for width in (32, 64, 128)], kernel_size=2)
    assert len(space) == 35


@pytest.mark.parametrize(("family", "options"), [
    ("mobilenet", ["--kernel_size", 1]),
    pytest.param(
        "resnet-swin", ["--across_stages", "--adapter", "bottleneck", "--rescale", "bilinear", "--adapter_norm", "batch"],
        marks=pytest.mark.slow,
    ),
    pytest.param("convnext", ["--shared", "mean", "--kernel_size", 1], marks=pytest.mark.slow),
])  # fmt: skip
def test_sn_nets_procedure_from_checkpoints_to_an_evaluated_bundle(family, options, tmp_path):
    """Anchors adapted whole, each alone; then stitched, all weights training, taught by another model."""
    side, folders = 16 if family == "convnext" else 32, []
    for number, anchor in enumerate(build(family)):
        anchor.save_pretrained(tmp_path / str(number))
        ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(tmp_path / str(number))
        folders.append(tmp_path / str(number))
    (x, y), (x_val, y_val) = pictures(24, 0), pictures(12, 1)
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_val=x_val, y_val=y_val, x_test=x_val, y_test=y_val)
    common = [
        "--data", tmp_path / "d.npz", "--train_split", "train+val", "--max_steps", 4, "--use_cpu", "--report_to", "none",
        "--global_batch_size", 8, "--per_device_train_batch_size", 8, "--save_strategy", "no",
    ]  # fmt: skip
    adapted = tmp_path / "adapted"
    for how in (["--full", "--save", adapted], ["--rank", 2]):
        rows = tmp_path / "rows.json"
        python("recipes/vision_baseline.py", "--anchors", *folders, *common, *how, "--rows", rows)
        found = json.loads(rows.read_text())
        assert [set(row) for row in found.values()] == [
            {"loss", "loss_test", "accuracy", "accuracy_test", "trained", "seconds"}
        ] * 2
    python(
        "recipes/finetune_vision.py", "--anchors", adapted / "0", adapted / "1", *common, *options, "--full", "--sampling",
        "uniform", "--no_inplace_teacher", "--anchor_share", "0", "--teacher", adapted / "1", "--anchor_lr_scale", "0.1",
        "--dtype", "float32", "--baselines", rows, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    row = json.loads((tmp_path / "out" / "result.json").read_text())
    assert row["train_images"] == 36
    assert set(row["trainable"]) == {"anchors", "stitching_layers"}
    before = load_file(tmp_path / "1" / "model.safetensors")
    after = load_file(adapted / "1" / "model.safetensors")
    assert not any(torch.equal(tensor, after[name]) for name, tensor in before.items() if tensor.ndim > 1)
    assert len(row["baselines"]) == 2
    assert set(row["baselines"]) < {stitch["key"] for stitch in row["table"]["stitches"]}
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "bundle")
    assert len(model.space) == len(row["table"]["stitches"]) > 2
    assert model.choose("1B").key in {stitch.key for stitch in model.published}
