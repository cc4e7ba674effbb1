"""Digests of an anchor's weights by part, to detect an anchor with other weights than those trained on.

A quick digest reads of each tensor its name, dtype, shape and sixteen evenly spaced pages, as reading 40 GB at every load
would be slow: that catches a re-trained, converted or re-quantised checkpoint, not a single flipped bit. A
complete digest reads all bytes.
"""

import hashlib
import json
import os
import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_PAGE, _PAGES = 4096, 16
_CHUNK = 2**24  # bytes read at once of a whole tensor
_BLOCK = re.compile(r"^(.*?layers\.\d+)\.")
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8"}

Entry = tuple[
    str, str, tuple[int, ...], int, Callable[[int, int], bytes]
]  # name, dtype, shape, bytes, read(start, size)


def part_of(tensor_name: str) -> str:
    """The part a tensor belongs to: its block, or itself outside the blocks."""
    match = _BLOCK.match(tensor_name)
    return match[1] if match else tensor_name


def fingerprint_files(
    paths: Iterable[Path], whole: bool = False, parts: Callable[[str], bool] | None = None
) -> dict[str, str]:
    """Part -> digest, of the safetensors files of one checkpoint; of the parts that `parts` wants, all by default.

    Raises:
        ValueError: a file is not safetensors, or shorter than its header says.
    """
    entries: list[Entry] = []
    for path in paths:
        header, offset = read_header(path)
        for name, info in header.items():
            if parts is None or parts(part_of(name)):
                start, stop = info["data_offsets"]
                reader = _file_reader(path, offset + start)
                entries.append((name, info["dtype"], tuple(info["shape"]), stop - start, reader))
    return _digest(entries, whole)


def fingerprint_tensors(tensors: Mapping[str, torch.Tensor], whole: bool = False) -> dict[str, str]:
    """Part -> digest of weights in memory; equal to that of files with the same dtype and names."""
    entries: list[Entry] = []
    for name, tensor in tensors.items():
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype))
        entries.append((name, dtype, tuple(tensor.shape), raw.nbytes, _array_reader(raw)))
    return _digest(entries, whole)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
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
        except (ValueError, RecursionError):
            raise ValueError(f"{path} has no safetensors header: only safetensors weights are read") from None
    try:
        header.pop("__metadata__", None)
        spans = [_span(**info) for info in header.values()]
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{path} has a damaged safetensors header: copy or download it again") from None
    needed = 8 + length + max((stop for _, stop in spans), default=0)
    if needed > size:
        raise ValueError(
            f"{path} is truncated: {size} bytes where its header needs {needed}: copy or download it again"
        )
    return header, 8 + length


def _span(dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[int, int]:
    """Start and stop of a tensor's bytes.

    Raises:
        TypeError, ValueError: an invalid entry of the header.
    """
    start, stop = data_offsets
    whole = [type(number) is int and number >= 0 for number in (start, stop, *shape)]
    if not isinstance(dtype, str) or not all(whole) or start > stop:
        raise ValueError
    return start, stop


def _array_reader(raw: Any) -> Callable[[int, int], bytes]:
    def read(start: int, size: int) -> bytes:
        return bytes(raw[start : start + size].tobytes())

    return read


def _file_reader(path: Path, base: int) -> Callable[[int, int], bytes]:
    def read(start: int, size: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(base + start)
            return file.read(size)

    return read


def _digest(entries: list[Entry], whole: bool) -> dict[str, str]:
    parts: dict[str, list[Entry]] = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: entry[0]):
        parts[part_of(entry[0])].append(entry)
    if not whole:
        return {part: _sampled(of_part)[:16] for part, of_part in parts.items()}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter to others
        return dict(zip(parts, pool.map(_whole, parts.values())))


def _sampled(entries: list[Entry]) -> str:
    digest = hashlib.sha256()
    for name, dtype, shape, size, read in entries:
        digest.update(json.dumps([name, dtype, shape]).encode())
        last = max(0, size - _PAGE)
        for start in sorted({last * page // (_PAGES - 1) for page in range(_PAGES)}):
            digest.update(read(start, min(_PAGE, size)))
    return digest.hexdigest()


def _whole(entries: list[Entry]) -> str:
    digest = hashlib.sha256()
    for name, dtype, shape, size, read in entries:
        digest.update(json.dumps([name, dtype, shape]).encode())
        for start in range(0, size, _CHUNK):
            digest.update(read(start, min(_CHUNK, size - start)))
    return digest.hexdigest()
