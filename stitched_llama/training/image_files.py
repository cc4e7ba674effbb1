"""One image from a file or an array, rotated upright and in 8 bits; labels as class numbers."""

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
    """Whether a path is hidden, or a file that file managers create."""
    return path.name.startswith(".") or path.name.lower() in _JUNK


def is_image_name(path: Path) -> bool:
    """Whether a file name has the suffix of an image format."""
    from PIL import Image

    return path.suffix.lower() in Image.registered_extensions() and path.suffix.lower() != ".pdf"


@contextmanager
def _named(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each format raises other exceptions
        raise ValueError(f"{file} is no picture that can be opened: {first_line(error)}") from error


def open_image(file: Path) -> Any:
    """A Pillow image in RGB.

    Raises:
        ValueError: it cannot be opened; names the file.
    """
    from PIL import Image

    with _named(file), Image.open(io.BytesIO(file.read_bytes())) as image:
        return as_rgb(image)  # from memory: Pillow (13) memory-maps plain grey TIFF files and rotates those differently


def check_header(file: Path) -> None:
    """Rejects a file that is not an image, or has more pixels than Pillow opens, from its header alone.

    Raises:
        ValueError: names the file.
    """
    from PIL import Image

    with _named(file), Image.open(file):
        pass


def as_rgb(image: Any) -> Any:
    """A Pillow image rotated upright by its EXIF orientation, in RGB of 8 bits; 16 bits are scaled to 8.

    Raises:
        ValueError: values of 32 bits, whose range is unknown.
    """
    from PIL import Image, ImageOps

    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS)
    if image.mode in ("I", "F") and not sixteen:
        raise ValueError(
            f"it holds numbers of 32 bits (mode {image.mode}), whose white is not known: save it with 8 or 16"
        )
    if image.getexif().get(Image.ExifTags.Base.Orientation) is not None:
        image = ImageOps.exif_transpose(image)
    if sixteen:
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return image.convert("RGB")


def from_array(pixels: np.ndarray) -> Any:
    """A Pillow image in RGB, from [height, width(, channels)] of uint8."""
    from PIL import Image

    return Image.fromarray(pixels).convert("RGB")


def read_arrays(path: Path, needed: Iterable[str], further: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of a `.npz` by name; those of `further` are optional.

    Raises:
        ValueError: it cannot be read, or lacks a needed array.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            here = list(arrays.files)
            found = {name: arrays[name] for name in (*needed, *further) if name in here}
    except Exception as error:  # of zip, NumPy or memory
        raise ValueError(f"{path} cannot be read as a .npz: {first_line(error)}") from error
    if set(needed) - set(found):
        raise ValueError(f"{path} has no {' and '.join(needed)}: it holds {', '.join(here)}")
    return found


def channels_last(pixels: np.ndarray, where: str) -> np.ndarray:
    """[images, height, width(, 3 or 4)] from grey or colour images with channels last, first or absent.

    Raises:
        ValueError: the shape is not one of images, or the channel axis is ambiguous.
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
    """Labels as an array of numbers or strings where all have that type, else of objects."""
    labels = list(labels)
    try:
        if all(isinstance(label, str) for label in labels):
            return np.array(labels, dtype=str)
        found = np.array(labels)
        return found if found.dtype.kind in "biuf" else np.array(labels, dtype=object)
    except ValueError:  # lists of several lengths
        return np.fromiter(labels, dtype=object, count=len(labels))


def classes_of(labels: np.ndarray, names: Sequence[str] | None, where: str) -> tuple[list[int], list[str]]:
    """The class number of each image, and the class names.

    Args:
        labels: [images] or [images, 1] of whole numbers or class names, or [images, classes] one-hot.
        names: of the classes; by default the sorted class names, or the numbers up to the largest.

    Raises:
        ValueError: a label is missing, has several classes, or is not a whole number.
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
