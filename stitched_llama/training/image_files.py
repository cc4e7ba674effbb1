"""One picture from a file or an array, upright and in 8 bits; labels as numbers of classes."""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from stitched_llama.space import first_line

_JUNK = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"}
_SIXTEEN_BITS = ("PNG", "PPM")  # what Pillow opens as 32 bits where such files hold 16
_MOST_CLASSES = 100_000


def is_junk(path: Path) -> bool:
    """What file managers leave in folders, and what is hidden."""
    return path.name.startswith(".") or path.name.lower() in _JUNK


def is_picture_name(path: Path) -> bool:
    """Whether a file is named as a picture is."""
    from PIL import Image

    return path.suffix.lower() in Image.registered_extensions() and path.suffix.lower() != ".pdf"


@contextmanager
def _named(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each format has its own
        raise ValueError(f"{file} is no picture that can be opened: {first_line(error)}") from error


def open_picture(file: Path) -> Any:
    """A picture of Pillow, RGB.

    Raises:
        ValueError: it cannot be opened; names the file.
    """
    from PIL import Image

    with _named(file), Image.open(io.BytesIO(file.read_bytes())) as picture:
        return as_rgb(picture)  # from memory: Pillow (13) maps files of plain grey TIFFs, and turns these otherwise


def check_header(file: Path) -> None:
    """Refuses a file that is none of a picture, or one of more pixels than Pillow opens, by its header alone.

    Raises:
        ValueError: names the file.
    """
    from PIL import Image

    with _named(file), Image.open(file):
        pass


def as_rgb(picture: Any) -> Any:
    """Turned upright, as EXIF says, and in 8 bits: of 16 those of equal brightness.

    Raises:
        ValueError: numbers of 32 bits, whose white is not known.
    """
    from PIL import Image, ImageOps

    sixteen = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in _SIXTEEN_BITS)
    if picture.mode in ("I", "F") and not sixteen:
        raise ValueError(
            f"it holds numbers of 32 bits (mode {picture.mode}), whose white is not known: save it with 8 or 16"
        )
    if picture.getexif().get(Image.ExifTags.Base.Orientation) is not None:
        picture = ImageOps.exif_transpose(picture)
    if sixteen:
        picture = Image.fromarray(((np.asarray(picture).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # the same colours, without Pillow's warning
    return picture.convert("RGB")


def from_array(pixels: np.ndarray) -> Any:
    """A picture of Pillow, RGB, from [height, width(, channels)] of uint8."""
    from PIL import Image

    return Image.fromarray(pixels).convert("RGB")


def read_arrays(path: Path, needed: Iterable[str], further: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of a `.npz` by name.

    Raises:
        ValueError: it cannot be read, or has not all that is needed.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            here = list(arrays.files)
            found = {name: arrays[name] for name in (*needed, *further) if name in here}
    except Exception as error:  # of zip, of NumPy, of memory
        raise ValueError(f"{path} cannot be read as a .npz: {first_line(error)}") from error
    if set(needed) - set(found):
        raise ValueError(f"{path} has no {' and '.join(needed)}: it holds {', '.join(here)}")
    return found


def channels_last(pixels: np.ndarray, where: str) -> np.ndarray:
    """[images, height, width(, 3 or 4)] of grey or coloured pictures whose channels came last, first or not at all.

    Raises:
        ValueError: the shape is no pictures', or does not tell which axis the channels are.
    """
    shape = list(pixels.shape)
    last, first = (pixels.ndim == 4 and shape[axis] in channels for axis, channels in ((3, (1, 3, 4)), (1, (1, 3))))
    if 0 in shape[1:] or not (pixels.ndim == 3 or last or first):
        raise ValueError(
            f"{where} is {shape}: [images, height, width] or [images, height, width, 1, 3 or 4 channels] is needed"
        )
    if last and first:
        raise ValueError(
            f"{where} is {shape}: axis 1 or axis 3 may be the channels; leave out an axis of 1, or enlarge the pictures"
        )
    if first:
        pixels = pixels.transpose(0, 2, 3, 1)
    return pixels[..., 0] if pixels.ndim == 4 and pixels.shape[3] == 1 else pixels


def as_array(labels: Iterable[Any]) -> np.ndarray:
    """Labels as they come, in an array of numbers or texts if they are that throughout."""
    labels = list(labels)
    try:
        if all(isinstance(label, str) for label in labels):
            return np.array(labels, dtype=str)
        found = np.array(labels)
        return found if found.dtype.kind in "biuf" else np.array(labels, dtype=object)
    except ValueError:  # lists of several lengths
        return np.fromiter(labels, dtype=object, count=len(labels))


def classes_of(labels: np.ndarray, names: Sequence[str] | None, where: str) -> tuple[list[int], list[str]]:
    """The number of each picture's class, and the classes' names.

    Args:
        labels: [images] or [images, 1] of whole numbers or texts, or [images, classes] with a 1 at the class.
        names: of the classes; by default the texts in order, or the numbers up to the largest.

    Raises:
        ValueError: a label is none, several, or no whole number.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.dtype.kind in "biuf":
        return _one_hot(labels, names, where)
    if labels.ndim != 1:
        raise ValueError(f"{where} is {list(labels.shape)}: one label an image is needed")
    if labels.dtype.kind in "US":
        texts = [label.decode() if isinstance(label, bytes) else str(label) for label in labels]
        numbers = {name: number for number, name in enumerate(names or sorted(set(texts)))}
        if unknown := next((text for text in texts if text not in numbers), None):
            raise ValueError(f"{where} has the label {unknown!r}, which is none of the classes {', '.join(numbers)}")
        return [numbers[text] for text in texts], list(numbers)
    if labels.dtype.kind not in "biuf":
        wrong = ((i, label) for i, label in enumerate(labels) if not isinstance(label, int | float | str))
        number, label = next(wrong, (0, labels[0]))
        raise ValueError(
            f"{where}: the label of picture {number} is {label!r:.60}, the number or name of one class is needed"
        )
    whole = (
        np.isfinite(labels) & (labels == np.floor(labels)) if labels.dtype.kind == "f" else np.ones(len(labels), bool)
    )
    if not whole.all():
        number = int(np.argmin(whole))
        raise ValueError(f"{where}: the label of picture {number} is {labels[number]}, a whole number is needed")
    numbers = [int(label) for label in labels]
    if names is None:
        if max(numbers, default=0) >= _MOST_CLASSES:
            raise ValueError(f"{where} has the label {max(numbers)}: number the classes from 0, or give class_names")
        names = [str(number) for number in range(max(numbers, default=-1) + 1)]
    return numbers, list(names)


def _one_hot(labels: np.ndarray, names: Sequence[str] | None, where: str) -> tuple[list[int], list[str]]:
    single = ((labels == 0) | (labels == 1)).all(1) & (labels.sum(1) == 1)
    if not single.all():
        number = int(np.argmin(single))
        raise ValueError(
            f"{where}: the labels of picture {number} are {labels[number].tolist()!s:.60}, one class an image is needed"
        )
    return labels.argmax(1).tolist(), list(names or map(str, range(labels.shape[1])))
