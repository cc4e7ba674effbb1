"""The file format of bundles: JSON and safetensors, written atomically; independent of models.

atomic       writes a set of files completely or not at all
digests      detects a changed file of a folder
fingerprint  detects an anchor with other weights than those trained on
int8         stitching layers in half the bytes
bundle       open, read, verify, write
"""

from .atomic import reading, recover, staged_files, write_atomically
from .bundle import (
    CARD,
    CONFIG,
    GENERATION,
    RECORDED,
    TABLE,
    WEIGHTS,
    Bundle,
    check_finite,
    dump_json,
    recorded_files,
    write_bundle,
)
from .digests import DIGESTS, read_digests, sha256, verify_digests, write_digests
from .fingerprint import fingerprint_files, fingerprint_tensors, part_of, read_header
from .int8 import dequantize_rows, quantize_rows

__all__ = [
    "CARD",
    "CONFIG",
    "DIGESTS",
    "GENERATION",
    "RECORDED",
    "TABLE",
    "WEIGHTS",
    "Bundle",
    "check_finite",
    "dequantize_rows",
    "dump_json",
    "fingerprint_files",
    "fingerprint_tensors",
    "part_of",
    "quantize_rows",
    "read_digests",
    "read_header",
    "reading",
    "recorded_files",
    "recover",
    "sha256",
    "staged_files",
    "verify_digests",
    "write_atomically",
    "write_bundle",
    "write_digests",
]
