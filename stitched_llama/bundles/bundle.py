"""The files of a bundle: read, write and verify. Knows tensors and tables, no model; JSON and safetensors only."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .atomic import recover, staged_files
from .digests import sha256
from .fingerprint import read_header

CONFIG, WEIGHTS, TABLE, CARD, GENERATION = (
    "config.json",
    "model.safetensors",
    "stitches.json",
    "README.md",
    "generation_config.json",
)


def dump_json(content: Any) -> str:
    """JSON as every file of the project has it: sorted keys, two spaces, a final newline."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, its JSON read, its tensors still there.

    Attributes:
        folder: where it lies.
        config: the fields of `config.json`.
        table: the fields of `stitches.json`.
        shapes: tensor name -> shape, from the header of `model.safetensors`.
    """

    folder: Path
    config: Mapping[str, Any]
    table: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, folder: str | Path) -> "Bundle":
        """Reads the tables of a bundle and checks that its weights are whole.

        Raises:
            ValueError: a file is missing, damaged or cut short, or the space of config and table differ.
        """
        folder = Path(folder)
        recover(folder)
        if not folder.is_dir():
            raise ValueError(
                f"there is no folder {folder}: name one that holds a bundle (chat and from_pretrained take Hub ids too)"
            )
        for name in (CONFIG, WEIGHTS, TABLE):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} is not a bundle: it has no {name}")
        config, table = _read_json(folder / CONFIG), _read_json(folder / TABLE)
        ours, theirs = config.get("space_digest"), table.get("space_digest")
        if ours != theirs:
            raise ValueError(
                f"{folder}: {CONFIG} has space {ours} and {TABLE} has {theirs}: the files are of two bundles"
            )
        if not isinstance(table.get("stitches"), list):
            raise ValueError(
                f"{folder / TABLE} has no list of stitches: the bundle is damaged, save or download it again"
            )
        for index, anchor in enumerate(config.get("anchors") or []):
            if missing := {"name_or_path", "revision", "fingerprint"} - set(anchor):
                raise ValueError(
                    f"{folder / CONFIG}: anchor {index} has no {sorted(missing)[0]}: the bundle is damaged"
                )
        header, _ = read_header(folder / WEIGHTS)
        return cls(folder, config, table, {name: tuple(info["shape"]) for name, info in header.items()})

    def load_tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Reads the named tensors and no others.

        Raises:
            ValueError: a tensor is missing (named), or the file is damaged.
        """
        names = list(names)
        if missing := [name for name in names if name not in self.shapes]:
            raise ValueError(
                f"{self.folder / WEIGHTS} lacks {len(missing)} of {len(names)} tensors, the first is {missing[0]}: "
                "the bundle is incomplete, save or download it again"
            )
        try:
            with safe_open(self.folder / WEIGHTS, framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{self.folder / WEIGHTS} is damaged: {error}") from None

    def verify_weights(self) -> None:
        """Reads all weights and compares them with the digest of the table.

        Raises:
            ValueError: they differ.
        """
        expected, found = self.table.get("weights_sha256"), sha256(self.folder / WEIGHTS)
        if expected != found:
            raise ValueError(f"{self.folder / WEIGHTS} has SHA-256 {found}, {TABLE} says {expected}: the file changed")


def write_bundle(
    folder: str | Path, tensors: Mapping[str, torch.Tensor], table: Mapping[str, Any], texts: Mapping[str, str]
) -> None:
    """Writes a bundle atomically: weights, table with their digest, and further text files by name."""
    with staged_files(folder) as stage:
        contiguous = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
        save_file(contiguous, stage / WEIGHTS, metadata={"format": "pt"})
        (stage / TABLE).write_text(dump_json({**table, "weights_sha256": sha256(stage / WEIGHTS)}), encoding="utf-8")
        for name, text in texts.items():
            (stage / name).write_text(text, encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where an object is needed")
    return content
