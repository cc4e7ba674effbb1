"""Hostile pictures, image folders and arrays, from a seed: read as plain Pillow and NumPy read them, or refused by name.

`cases(rng)` yields (name, run) without end; `run()` returns what was refused, or None, and raises AssertionError where a picture or
its label is silently different, an error names no file, or a library's own exception comes through.
"""

import io
import struct
import tempfile
import warnings
import zlib
from functools import partial
from itertools import count
from pathlib import Path
from random import Random

import numpy as np
from fuzzing_data import Different, attempted, damaged, framed
from PIL import Image

from stitched_llama.training import read_images

FORMATS = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "jpg": ("L", "RGB", "CMYK"), "tiff": ("1", "L", "RGB", "I;16", "I;16B", "I", "F"),
    "bmp": ("1", "L", "P", "RGB"), "gif": ("L", "P", "RGB"), "webp": ("RGB", "RGBA"), "ppm": ("L", "RGB"), "pgm": ("L", "I;16"),
    "jp2": ("L", "RGB", "I;16"), "tga": ("L", "RGB", "RGBA"), "pcx": ("L", "RGB"), "ico": ("RGBA",),
}  # fmt: skip
JUNK = ("Thumbs.db", "desktop.ini", ".DS_Store", "._a.png", ".hidden", "THUMBS.DB")
TURNS = {
    2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a),
}  # fmt: skip


def some_picture(rng, form, side=16):
    """Bytes of a picture file."""
    mode, size, buffer = rng.choice(FORMATS[form]), (rng.randint(1, side), rng.randint(1, side)), io.BytesIO()
    if mode in ("I;16", "I;16B"):
        picture = Image.frombytes(mode, size, rng.randbytes(2 * size[0] * size[1]))
    elif mode in ("I", "F"):
        values = [rng.uniform(0, 70_000) for _ in range(size[0] * size[1])]
        picture = Image.fromarray(np.array(values, dtype=np.int32 if mode == "I" else np.float32).reshape(size[::-1]))
    else:
        picture = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).convert(mode)
    how = {}
    if form in ("jpg", "png", "tiff", "webp") and rng.random() < 0.5:
        exif = Image.Exif()
        exif[274] = rng.choice([*range(1, 9), *range(1, 9), 0, 9, 300])
        how["exif"] = exif
    if form == "jp2" and mode == "I;16":
        how["irreversible"] = False
    picture.save(
        buffer, {"jpg": "JPEG", "jp2": "JPEG2000", "pgm": "PPM", "tiff": "TIFF"}.get(form, form.upper()), **how
    )
    return buffer.getvalue()


def bomb(rng):
    """A PNG whose header promises gigapixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", rng.choice([30_000, 2**31 - 1]), 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def plain_picture(raw):
    """[height, width, 3] as plain Pillow and NumPy see a file; None where they do not, or do not know what is white."""
    try:
        with Image.open(io.BytesIO(raw)) as picture:
            picture.load()
            turn = TURNS.get(picture.getexif().get(274), lambda a: a)
            if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
                eight = np.rint(np.asarray(picture).astype(np.float64) / 257)
                return turn(np.stack([eight.clip(0, 255).astype(np.uint8)] * 3, -1))
            if picture.mode in ("I", "F"):
                return None
            return turn(np.asarray(picture.convert("RGBA" if picture.mode == "P" else "RGB").convert("RGB")))
    except Exception:
        return None


def all_of(images):
    return [np.asarray(picture) for picture in images.pictures], images.labels, images.names


def run_folder(seed):
    """Classes of a few pictures, some of them damaged, with junk between them."""
    rng = Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        root, wanted, labels, whole = Path(folder) / "train", [], [], rng.random() < 0.6
        for name in rng.sample(["ant", "bee", "cat"], rng.randint(1, 3)):
            (root / name).mkdir(parents=True)
            for index in range(rng.randint(1, 2)):
                form = rng.choice([*FORMATS])
                raw = some_picture(rng, form)
                if not whole and rng.random() < 0.6:
                    raw = bomb(rng) if rng.random() < 0.1 else damaged(raw, rng)
                (root / name / f"{index}.{form}").write_bytes(raw)
            if rng.random() < 0.3:
                (root / name / rng.choice(JUNK)).write_bytes(rng.randbytes(9))
        for number, place in enumerate(sorted(root.iterdir())):
            for file in sorted(place.iterdir()):
                if file.name[:1].isdecimal():
                    wanted.append(plain_picture(file.read_bytes()))
                    labels.append(number)
        if rng.random() < 0.2:
            (root / "Thumbs.db").write_bytes(b"junk")
        return judged(lambda: all_of(read_images(folder)), wanted, labels, folder, whole)


def judged(read, wanted, labels, place, whole):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, refusal = attempted(read)
    unknown = any(picture is None for picture in wanted)
    if refusal is not None:
        assert place in refusal, f"names no file: {refusal}"
        assert not whole or unknown, f"refused: {refusal}"
        return refusal
    assert not unknown, "read, though plain Pillow does not"
    pictures, numbers, _ = found
    if numbers != labels or any(not np.array_equal(a, b) for a, b in zip(pictures, wanted, strict=True)):
        raise Different(f"other pictures or labels: {numbers} for {labels}")
    return None


def run_npz(seed):
    """Arrays in every layout and dtype, labels in every form, some damaged."""
    rng = Random(seed)
    shape, images = (rng.randint(5, 9), rng.randint(5, 9)), rng.randint(1, 5)
    colours = np.frombuffer(rng.randbytes(images * shape[0] * shape[1] * 3), np.uint8).reshape(images, *shape, 3)
    layout = rng.choice(["last", "first", "grey", "grey last", "grey first", "float", "flat", "two", "16"])
    x = {
        "last": colours, "first": colours.transpose(0, 3, 1, 2), "grey": colours[..., 0], "grey last": colours[..., :1],
        "grey first": colours[:, None, ..., 0], "float": colours / 255, "flat": colours.reshape(images, -1), "two": colours[..., :2],
        "16": colours.astype(np.uint16),
    }[layout]  # fmt: skip
    wanted = None
    if layout in ("last", "first"):
        wanted = list(colours)
    elif "grey" in layout:
        wanted = [np.stack([picture] * 3, -1) for picture in colours[..., 0]]
    classes = rng.randint(2, 4)
    labels = [rng.randrange(classes) for _ in range(images)]
    names = np.array(["ant", "bee", "cat", "dog"][:classes])
    y, numbers = {
        "int": (np.array(labels), labels), "uint8": (np.array(labels, np.uint8), labels), "float": (np.array(labels, float), labels),
        "column": (np.array(labels)[:, None], labels), "one-hot": (np.eye(classes)[labels], labels),
        "text": (names[labels], sorted(set(names[labels].tolist()))), "half": (np.array(labels) + 0.5, None),
        "several": (np.ones((images, 3)), None), "nan": (np.full(images, np.nan), None), "negative": (np.array(labels) - 9, None),
        "huge": (np.array(labels) + 10**9, None), "none": (np.array([None] * images), None), "short": (np.array(labels + [0]), None),
        "complex": (np.array(labels) + 1j, None), "deep": (np.zeros((images, 2, 2)), None),
    }[rng.choice(["int", "uint8", "float", "column", "one-hot", "text", "half", "several", "nan", "negative", "huge", "none", "short", "complex", "deep"])]  # fmt: skip
    if isinstance(numbers, list) and numbers and isinstance(numbers[0], str):
        numbers = [numbers.index(name) for name in names[labels]]
    with tempfile.TemporaryDirectory() as folder:
        path, whole = Path(folder) / "d.npz", rng.random() < 0.7
        (np.savez if rng.random() < 0.5 else np.savez_compressed)(path, x_train=x, y_train=y)
        if not whole:
            path.write_bytes(damaged(path.read_bytes(), rng))
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    if not (np.array_equal(arrays["x_train"], x) and np.array_equal(arrays["y_train"], y)):
                        return attempted(lambda: all_of(read_images(str(path))))[1]  # other arrays: whatever they are
            except Exception:
                wanted = None
        known = wanted is not None and numbers is not None
        return judged(lambda: all_of(read_images(str(path))), wanted if known else [None], numbers, str(path), whole)


def cases(rng):
    for number in count(rng.randrange(5)):
        run = run_npz if number % 5 < 2 else run_folder
        seed = rng.getrandbits(64)
        yield f"{run.__name__}-{seed:x}", partial(run, seed)


KINDS = {"images": (lambda folder: folder.mkdir(parents=True), framed(cases), 200)}
