"""A quick digest of an anchor's weights, part by part, that tells when an anchor is no longer the one trained on.

Reading 40 GB at every load would be slow, so each tensor gives its name, dtype, shape and sixteen evenly spaced pages.
That catches a re-trained, converted or re-quantised checkpoint, not a single flipped bit.
"""

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

_PAGE, _PAGES = 4096, 16
_BLOCK = re.compile(r"^(.*?layers\.\d+)\.")
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8"}

Entry = tuple[
    str, str, tuple[int, ...], int, Callable[[int, int], bytes]
]  # name, dtype, shape, bytes, read(start, size)


def part_of(tensor_name: str) -> str:
    """The part a tensor belongs to: its block, or itself outside the blocks."""
    match = _BLOCK.match(tensor_name)
    return match[1] if match else tensor_name


def fingerprint_files(paths: Iterable[Path]) -> dict[str, str]:
    """Part -> digest, of the safetensors files of one checkpoint.

    Raises:
        ValueError: a file is not safetensors, or shorter than its header says.
    """
    entries: list[Entry] = []
    for path in paths:
        header, offset = read_header(path)
        for name, info in header.items():
            start, stop = info["data_offsets"]
            entries.append(
                (name, info["dtype"], tuple(info["shape"]), stop - start, _file_reader(path, offset + start))
            )
    return _digest(entries)


def fingerprint_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Part -> digest, of weights in memory; equal to the files' where dtype and names are."""
    entries = []
    for name, tensor in tensors.items():
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype))
        entries.append((name, dtype, tuple(tensor.shape), raw.nbytes, lambda start, size, raw=raw: raw[start : start + size].tobytes()))  # fmt: skip
    return _digest(entries)


def read_header(path: Path) -> tuple[dict, int]:
    """The tensor table of a safetensors file and the offset of its data.

    Raises:
        ValueError: the file is not safetensors, or shorter than its header says.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{path} is not a whole safetensors file ({size} bytes): copy or download it again")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError(f"{path} has no safetensors header: only safetensors weights are read") from None
    try:
        header.pop("__metadata__", None)
        needed = 8 + length + max((info["data_offsets"][1] for info in header.values()), default=0)
        _ = [(info["dtype"], tuple(info["shape"])) for info in header.values()]
    except (AttributeError, TypeError, KeyError, IndexError):
        raise ValueError(f"{path} has a damaged safetensors header: copy or download it again") from None
    if needed > size:
        raise ValueError(
            f"{path} is truncated: {size} bytes where its header needs {needed}: copy or download it again"
        )
    return header, 8 + length


def _file_reader(path: Path, base: int) -> Callable[[int, int], bytes]:
    def read(start: int, size: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(base + start)
            return file.read(size)

    return read


def _digest(entries: list[Entry]) -> dict[str, str]:
    digests: dict[str, hashlib._Hash] = {}
    for name, dtype, shape, size, read in sorted(entries, key=lambda entry: entry[0]):
        digest = digests.setdefault(part_of(name), hashlib.sha256())
        digest.update(json.dumps([name, dtype, shape]).encode())
        last = max(0, size - _PAGE)
        for start in sorted({last * page // (_PAGES - 1) for page in range(_PAGES)}):
            digest.update(read(start, min(_PAGE, size)))
    return {part: digest.hexdigest()[:16] for part, digest in digests.items()}
