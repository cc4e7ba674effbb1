"""Reads, writes and verifies the files of a bundle, JSON and safetensors only; independent of models."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stitched_llama.space import read_object

from .atomic import reading, staged_files
from .digests import DIGESTS, digests_text, read_digests, sha256, verify_digests

CONFIG, WEIGHTS, TABLE, CARD, GENERATION = (
    "config.json",
    "model.safetensors",
    "stitches.json",
    "README.md",
    "generation_config.json",
)
RECORDED = (CONFIG, WEIGHTS, TABLE, GENERATION)  # what loading reads; the card may be edited
_REFERENCE: dict[str, Any] = {"name_or_path": (str, NoneType), "revision": (str, NoneType), "fingerprint": dict}
_DTYPES = ("F64", "F32", "BF16", "F16", "I8")


def dump_json(content: Any) -> str:
    """The JSON format of all files of the project: sorted keys, two spaces, a final newline."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, from one save: JSON files in memory, tensors read on request.

    Attributes:
        folder: of the bundle.
        config: the fields of `config.json`.
        table: the fields of `stitches.json`.
        generation: the fields of `generation_config.json`, or None.
        shapes: tensor name -> shape, from the header of `model.safetensors`.
    """

    folder: Path
    config: Mapping[str, Any]
    table: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    shapes: Mapping[str, tuple[int, ...]]
    _file: Any = field(repr=False, compare=False)  # maps the weights of this save, whatever is saved over them later

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True, weights: bool = True) -> "Bundle":
        """Reads the JSON files of a bundle and checks that all files are complete and unchanged.

        Args:
            verify: compare the files with `digests.json`; False is for a bundle that was edited on purpose, or is older than that.
            weights: compare the weights too, which takes a second for every few hundred MB.

        Raises:
            ValueError: a file is missing, damaged, cut short or changed, or the space of config and table differ.
            OSError: another process saves into the folder for minutes.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(
                f"there is no folder {folder}: name one that holds a bundle (chat and from_pretrained take Hub ids too)"
            )
        with reading(folder):
            for name in (CONFIG, WEIGHTS, TABLE):
                if not (folder / name).is_file():
                    raise ValueError(f"{folder} is not a bundle: it has no {name}")
            if verify:
                names = {*recorded_files(folder), *(n for n in read_digests(folder) if n in RECORDED)}
                verify_digests(folder, names if weights else names - {WEIGHTS})
            config, table = read_object(folder / CONFIG), read_object(folder / TABLE)
            generation = read_object(folder / GENERATION) if (folder / GENERATION).is_file() else None
            file, shapes = _open_weights(folder / WEIGHTS)
        _check_tables(folder, config, table)
        return cls(folder, config, table, generation, shapes, file)

    def load_tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Reads the named tensors and no others.

        Raises:
            ValueError: a tensor is missing or holds a number that is not finite (named), or the file is damaged.
        """
        names = list(names)
        if missing := [name for name in names if name not in self.shapes]:
            raise ValueError(
                f"{self.folder / WEIGHTS} lacks {len(missing)} of {len(names)} tensors, the first is {missing[0]}: "
                "the bundle is incomplete, save or download it again"
            )
        try:
            tensors = {name: self._file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{self.folder / WEIGHTS} is damaged: {error}") from None
        check_finite(tensors, str(self.folder / WEIGHTS))
        return tensors


def _open_weights(path: Path) -> tuple[Any, dict[str, tuple[int, ...]]]:
    try:
        file: Any = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}: save or download it again") from None
    if wrong := [name for name, part in slices.items() if part.get_dtype() not in _DTYPES]:
        found = slices[wrong[0]].get_dtype()
        raise ValueError(f"tensor {wrong[0]} of {path} is {found}, which no bundle holds: it was changed")
    return file, {name: tuple(part.get_shape()) for name, part in slices.items()}


def recorded_files(folder: Path) -> list[str]:
    """The files of a bundle that its digests cover."""
    return [name for name in RECORDED if (folder / name).is_file()]


def check_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Rejects tensors with NaN or infinite entries.

    Raises:
        ValueError: names the tensor and how many of its entries are NaN or infinite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not (finite := torch.isfinite(tensor)).all():
            raise ValueError(
                f"tensor {name} of {where} holds {int((~finite).sum())} of {tensor.numel()} entries that are NaN or infinite: "
                "go back to a checkpoint from before"
            )


def write_bundle(
    folder: str | Path, tensors: Mapping[str, torch.Tensor], table: Mapping[str, Any], texts: Mapping[str, str]
) -> None:
    """Writes a bundle atomically: weights, table, further text files by name, and the digests of all but the card.

    Raises:
        ValueError: a tensor holds a number that is not finite.
    """
    contiguous = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    check_finite(contiguous, "this model")
    with staged_files(folder) as stage:
        save_file(contiguous, stage / WEIGHTS, metadata={"format": "pt"})
        for name, text in {TABLE: dump_json(table), **texts}.items():
            (stage / name).write_text(text, encoding="utf-8")
        digests = {name: sha256(stage / name) for name in recorded_files(stage)}
        (stage / DIGESTS).write_text(digests_text(digests), encoding="utf-8")


def _check_tables(folder: Path, config: Mapping[str, Any], table: Mapping[str, Any]) -> None:
    ours, theirs = config.get("space_digest"), table.get("space_digest")
    if ours != theirs:
        raise ValueError(
            f"{folder}: {CONFIG} has space {ours!r} and {TABLE} has {theirs!r}: the files are of two bundles"
        )
    rows = table.get("stitches")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{folder / TABLE} has no list of stitches: the bundle is damaged, save or download it again")
    anchors = config.get("anchors") or []
    for index, anchor in enumerate(anchors if isinstance(anchors, list) else [anchors]):
        for name, kinds in _REFERENCE.items():
            if not isinstance(anchor, dict) or name not in anchor or not isinstance(anchor[name], kinds):
                raise ValueError(f"{folder / CONFIG}: anchor {index} has no {name} that is one: the bundle is damaged")
        if not isinstance(anchor.get("digests", {}), dict):
            raise ValueError(f"{folder / CONFIG}: anchor {index} has no digests that are some: the bundle is damaged")
