"""Pictures and labels as they lie on disk: read as a plain reader sees them, or refused by name."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers import ViTImageProcessor

from stitched_llama.training import ImageSet, read_images

GREYS = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 16 bits whose 8 bits are 0..255
COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3)).astype(np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def pixels(picture):
    assert picture.mode == "RGB"
    return np.asarray(picture)


def folder(path, **pictures):
    """`class=(name, picture, options of saving)`, one of each class."""
    for name, (file, picture, how) in pictures.items():
        (path / "train" / name).mkdir(parents=True, exist_ok=True)
        picture.save(path / "train" / name / file, **how)
    return read_images(str(path)).pictures


# ---- files


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.png", "I;16"), ("a.tiff", "I;16"), ("a.tiff", "I;16B"), ("a.pgm", "I;16"), ("a.jp2", "I;16")],
)
def test_greys_of_16_bits_keep_their_brightness(name, mode, tmp_path):
    picture = Image.frombytes(mode, (16, 16), GREYS.astype("<u2" if mode == "I;16" else ">u2").tobytes())
    how = {"irreversible": False} if name == "a.jp2" else {}
    (found,) = folder(tmp_path, grey=(name, picture, how))
    wanted = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(pixels(found), np.stack([wanted] * 3, -1))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_of_32_bits_are_refused(dtype, tmp_path):
    (found,) = (pictures := folder(tmp_path, grey=("a.tiff", Image.new("L", (2, 2)), {})))
    Image.fromarray(GREYS.astype(dtype)).save(tmp_path / "train" / "grey" / "a.tiff")
    with pytest.raises(ValueError, match=r"a\.tiff is no picture .* numbers of 32 bits \(mode [IF]\)"):
        pictures[0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
def test_pictures_stand_upright_as_datasets_shows_them(orientation, name, tmp_path):
    exif = Image.Exif()
    exif[274] = orientation
    (found,) = folder(tmp_path, a=(name, Image.fromarray(COLOURS[0]), {"exif": exif}))
    import datasets

    file = tmp_path / "train" / "a" / name
    wanted = datasets.Image(mode="RGB").decode_example({"path": str(file), "bytes": None})
    assert np.array_equal(pixels(found), np.asarray(wanted))
    assert found.size == ((10, 8) if orientation < 5 else (8, 10))
    with Image.open(file) as picture:
        assert np.array_equal(pixels(found), np.asarray(ImageOps.exif_transpose(picture).convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB"])
def test_plain_tiffs_stand_upright_too(mode, tmp_path):
    """Pillow maps such files where it is given their names, and turns them otherwise than what it reads from memory."""
    exif = Image.Exif()
    exif[274] = 6
    picture = Image.fromarray(GREYS[:4]) if mode == "I;16" else Image.fromarray(COLOURS[0][:4]).convert(mode)
    (found,) = folder(tmp_path, a=("a.tiff", picture, {"exif": exif}))
    (plain,) = folder(tmp_path / "plain", a=("a.tiff", picture, {}))
    assert np.array_equal(pixels(found), np.rot90(pixels(plain), -1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_brought_to_rgb(mode, tmp_path):
    picture = Image.fromarray(COLOURS[0]).convert(mode)
    name = "a.tiff" if mode in ("CMYK", "YCbCr") else "a.png"
    (found,) = folder(tmp_path, a=(name, picture, {"transparency": b"\0\x80"} if mode == "P" else {}))
    assert np.array_equal(pixels(found), np.asarray(picture.convert("RGB")))


def test_junk_is_passed_over_and_what_is_no_picture_is_named(tmp_path):
    grey = Image.new("RGB", (2, 2))
    folder(tmp_path, cat=("a.png", grey, {}), dog=("b.PNG", grey, {}))
    train = tmp_path / "train"
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._a.png"):
        (train / name).write_bytes(b"junk")
        (train / "cat" / name).write_bytes(b"junk")
    for name in ("__MACOSX", ".cache", "@eaDir"):
        (train / name).mkdir()
        (tmp_path / name / "x").mkdir(parents=True)
    (train / "README.md").write_text("of the data")
    images = read_images(str(tmp_path))
    assert (images.names, images.labels) == (["cat", "dog"], [0, 1])
    (train / "eel").mkdir()
    (train / "eel" / ".DS_Store").write_bytes(b"junk")
    with pytest.raises(ValueError, match="train/eel would be a class and holds no pictures"):
        read_images(str(tmp_path))
    grey.save(train / "eel" / "c.png")
    grey.save(train / "stray.jpg")
    with pytest.raises(ValueError, match=r"train/stray\.jpg lies beside the folders of classes"):
        read_images(str(tmp_path))
    (train / "stray.jpg").unlink()
    (train / "eel" / "inner").mkdir()
    for name in ("inner", "notes.txt"):
        if name == "notes.txt":
            (train / "eel" / "inner").rmdir()
            (train / "eel" / name).write_text("notes")
        with pytest.raises(ValueError, match=rf"eel/{name} is no picture that can be opened"):
            read_images(str(tmp_path))


def test_a_decompression_bomb_is_named(tmp_path, monkeypatch):
    folder(tmp_path, cat=("a.png", Image.new("RGB", (9, 9)), {}), dog=("b.png", Image.new("RGB", (30, 30)), {}))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(ValueError, match=r"dog/b\.png is no picture .* could be decompression bomb"):
        read_images(str(tmp_path))


def test_a_picture_that_breaks_later_is_named(tmp_path):
    pictures = folder(tmp_path, cat=("a.png", Image.fromarray(COLOURS[0]), {}))
    file = tmp_path / "train" / "cat" / "a.png"
    for raw in (file.read_bytes()[:60], b"", b"\x89PNG\r\n\x1a\n" + b"\0" * 40):
        file.write_bytes(raw)
        with pytest.raises(ValueError, match=r"cat/a\.png is no picture that can be opened"):
            pictures[0]


# ---- arrays


def npz(path, x=COLOURS, y=LABELS, split="train", **more):
    np.savez(path, **{f"x_{split}": x, f"y_{split}": y}, **more)
    return str(path)


GREY = COLOURS[..., 0]
SHAPES = {
    "channels last": (COLOURS, COLOURS),
    "channels first": (COLOURS.transpose(0, 3, 1, 2), COLOURS),
    "grey": (GREY, GREY),
    "grey, channel last": (GREY[..., None], GREY),
    "grey, channel first": (GREY[:, None], GREY),
    "with alpha": (np.concatenate([COLOURS, 0 * COLOURS[..., :1]], -1), COLOURS),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_arrays_are_read_whichever_axis_the_channels_are(shape, tmp_path):
    stored, wanted = SHAPES[shape]
    images = read_images(npz(tmp_path / "a.npz", stored))
    wanted = wanted if wanted.ndim == 4 else np.stack([wanted] * 3, -1)
    assert all(np.array_equal(pixels(picture), one) for picture, one in zip(images.pictures, wanted, strict=True))


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (np.zeros((6, 64), np.uint8), r"is \[6, 64\]: \[images, height, width\]"),
        (np.zeros((6, 8, 8, 2), np.uint8), r"is \[6, 8, 8, 2\]"),
        (np.zeros((6, 3, 8, 3), np.uint8), "axis 1 or axis 3 may be the channels"),
        (np.zeros((6, 0, 8, 3), np.uint8), r"is \[6, 0, 8, 3\]"),
        (np.zeros((6, 8, 8, 3), np.uint16), "is uint16"),
        (np.zeros((5, 8, 8, 3), np.uint8), "has 6 labels; as many uint8 pictures"),
    ],
)
def test_arrays_that_are_no_pictures_are_named(x, reason, tmp_path):
    with pytest.raises(ValueError, match=rf"a\.npz, x_train .*{reason}"):
        read_images(npz(tmp_path / "a.npz", x))


TEXTS = np.array(["cat", "dog", "eel", "cat", "dog", "eel"])
GOOD_LABELS = {
    "column": (LABELS[:, None], None),
    "one-hot": (np.eye(4)[LABELS], ["0", "1", "2", "3"]),
    "one-hot of bool": (np.eye(3, dtype=bool)[LABELS], None),
    "whole floats": (LABELS.astype(np.float32), None),
    "uint8": (LABELS.astype(np.uint8), None),
    "texts": (TEXTS, ["cat", "dog", "eel"]),
    "column of texts": (TEXTS[:, None], ["cat", "dog", "eel"]),
    "bytes": (TEXTS.astype("S"), ["cat", "dog", "eel"]),
}


@pytest.mark.parametrize("kind", GOOD_LABELS)
def test_labels_are_read_in_every_form(kind, tmp_path):
    stored, names = GOOD_LABELS[kind]
    images = read_images(npz(tmp_path / "a.npz", y=stored))
    assert images.labels == LABELS.tolist()
    assert all(type(label) is int for label in images.labels)
    assert images.names == (names or ["0", "1", "2"])


@pytest.mark.parametrize(
    ("y", "reason"),
    [
        (LABELS + np.array([0, 0, 0, 0.5, 0, 0]), "the label of picture 3 is 0.5, a whole number is needed"),
        (np.array([0, np.nan, 1, 1, 1, 1]), "the label of picture 1 is nan, a whole number"),
        (np.eye(3)[LABELS] * 0.9, r"the labels of picture 0 are \[0.9, 0.0, 0.0\], one class an image"),
        (np.ones((6, 3)), "the labels of picture 0 are"),
        (np.zeros((6, 3)), "the labels of picture 0 are"),
        (np.zeros((6, 2, 2)), r"is \[6, 2, 2\]: one label an image"),
        (LABELS + 10**9, "has the label 1000000002: number the classes from 0"),
        (np.array([None] * 6), "cannot be read as a .npz: Object arrays cannot be loaded"),
        (LABELS - 1, "picture 0: label -1 is outside the 2 classes"),
    ],
)
def test_labels_that_are_no_class_are_named(y, reason, tmp_path):
    with pytest.raises(ValueError, match=rf"a\.npz.*{reason}"):
        read_images(npz(tmp_path / "a.npz", y=y))


def test_parts_with_names_for_labels_agree_on_the_classes(tmp_path):
    x, path = COLOURS[:2], tmp_path / "a.npz"
    np.savez(path, x_train=x, y_train=["dog", "eel"], x_val=x, y_val=["eel", "cat"], x_test=x, y_test=["ant", "dog"])
    train = read_images(str(path))
    assert (train.names, train.labels) == (["dog", "eel"], [0, 1])
    both = read_images(str(path), "train+val")
    assert (both.names, both.labels) == (["cat", "dog", "eel"], [1, 2, 2, 0])
    with pytest.raises(ValueError, match="has the label 'ant', which is none of the classes cat, dog, eel"):
        read_images(str(path), "test", both.names)
    npz(path, class_names=np.array(["a", "b", "c"]))
    with pytest.raises(ValueError, match="calls class 1 'b', the other part 'x': they must agree"):
        read_images(str(path), names=["a", "x", "c"])


@pytest.mark.parametrize("raw", [b"", b"PK\3\4 no more", b"\x93NUMPY"])
def test_files_that_are_no_npz_are_named(raw, tmp_path):
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.npz cannot be read as a \.npz"):
        read_images(str(tmp_path / "a.npz"))


# ---- data sets


def table(labels, **features):
    import datasets

    buffers = [io.BytesIO() for _ in labels]
    exif = Image.Exif()
    exif[274] = 6
    for buffer, colours in zip(buffers, COLOURS):
        Image.fromarray(colours).save(buffer, "PNG", exif=exif)
    made = datasets.Dataset.from_dict({"image": [{"bytes": b.getvalue()} for b in buffers], "label": labels})
    return made.cast_column("image", datasets.Image()) if not features else made


def test_data_sets_on_disk_are_read_with_labels_of_every_form(tmp_path):
    import datasets

    for number, (labels, names) in enumerate(
        [
            (["cat", "dog", "eel"], ["cat", "dog", "eel"]),
            ([0, 1, 2], ["0", "1", "2"]),
            ([[0], [1], [2]], ["0", "1", "2"]),
        ]
    ):
        table(labels).save_to_disk(tmp_path / str(number))
        images = read_images(str(tmp_path / str(number)))
        assert (images.names, images.labels) == (names, [0, 1, 2])
        assert np.array_equal(pixels(images.pictures[1]), np.rot90(COLOURS[1], -1))
    for labels, reason in (
        ([[0], [0, 1], []], r"label of picture 0 is \[0\], the number or name of one class"),
        ([0, None, 1], "label of picture 1 is None"),
        ([0.0, 0.5, 1.0], "label of picture 1 is 0.5"),
    ):
        datasets.DatasetDict(val=table(labels)).save_to_disk(tmp_path / "bad")
        with pytest.raises(ValueError, match=rf"bad, val, label: the {reason}"):
            read_images(str(tmp_path / "bad"), "val")
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    table(["b", "a", "b"]).to_parquet(tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet")
    assert read_images(str(tmp_path / "parquet")).labels == [1, 0, 1]


def test_a_picture_of_a_data_set_that_cannot_be_opened_is_named(tmp_path):
    import datasets

    bad = datasets.Dataset.from_dict({"image": [{"bytes": b"no picture"}, None], "label": [0, 1]})
    bad.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "bad")
    images = read_images(str(tmp_path / "bad"))
    for row in (0, 1):
        with pytest.raises(ValueError, match=rf"the picture of .*bad, train, row {row} cannot be opened"):
            images.pictures[row]


# ---- grey anchors


def test_grey_anchors_get_grey_pictures(tmp_path):
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5])
    (found,) = folder(tmp_path, grey=("a.png", Image.fromarray(GREYS), {}))
    images = type("Images", (), {"pictures": [found], "labels": [0]})
    prepared = ImageSet(images, processor, channels=1)[0]["pixel_values"]
    assert prepared.shape == (1, 16, 16)
    assert np.allclose(prepared[0].numpy(), np.arange(256).reshape(16, 16) / 127.5 - 1, atol=1e-6)
    with pytest.raises(ValueError, match="images of 4 channels: 1 .* or 3 .* can be made"):
        ImageSet(images, processor, channels=4)
