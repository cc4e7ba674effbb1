"""The file format of bundles: JSON and safetensors, written atomically; knows no model.

atomic       all of a set of files or none
fingerprint  tells when an anchor is no longer the one trained on
int8         stitching layers in half the bytes
bundle       open, read, verify, write
"""

from .atomic import recover, staged_files, write_atomically
from .bundle import CARD, CONFIG, GENERATION, TABLE, WEIGHTS, Bundle, dump_json, sha256, write_bundle
from .fingerprint import fingerprint_files, fingerprint_tensors, part_of, read_header
from .int8 import dequantize_rows, quantize_rows

__all__ = [
    "CARD",
    "CONFIG",
    "GENERATION",
    "TABLE",
    "WEIGHTS",
    "Bundle",
    "dequantize_rows",
    "dump_json",
    "fingerprint_files",
    "fingerprint_tensors",
    "part_of",
    "quantize_rows",
    "read_header",
    "recover",
    "sha256",
    "staged_files",
    "write_atomically",
    "write_bundle",
]
