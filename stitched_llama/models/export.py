"""One size as a model of its own, which needs no anchors and, where it can be a plain model, not this package."""

import copy
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from stitched_llama.bundles import CARD, CONFIG, GENERATION, write_bundle
from stitched_llama.pst import biases_of, is_low_rank
from stitched_llama.space import Stitch, StitchTable

from .bundle_tensors import bundle_name
from .card import exported_card
from .merging import adapted_layers, merged_weight, settings_left
from .plain import plain_model, plain_obstacle
from .processors import load_processor
from .tokenizers import load_tokenizer
from .whole import anchor_tensors

CODE = "stitched_code.py"
_CODE = '''"""Names the classes of the package stitched-llama, which must be installed, for trust_remote_code=True."""

from stitched_llama import {config}, {model}

__all__ = ["{config}", "{model}"]
'''


@dataclass(frozen=True)
class Export:
    """What `export` wrote.

    Attributes:
        folder: where.
        stitch: which size.
        architecture: the class that loads it.
        not_plain: why it is no plain model of Transformers and needs this package; None where it is one.
    """

    folder: Path
    stitch: Stitch
    architecture: str
    not_plain: str | None = None


class ExportMixin:
    """`export` of stitched models."""

    @torch.no_grad()
    def export(
        self,
        folder: str | os.PathLike,
        stitch_id: int | str | None = None,
        budget: Any = None,
        context_tokens: int = 0,
        tokenizer: Any = None,
        plain: bool | None = None,
    ) -> Export:
        """Writes one size with all its weights into a new folder, PST merged; this model stays as it is.

        An anchor, and a stitch whose junctions are identities, becomes a plain model of LLaMA blocks, loaded by Transformers
        alone, its biases those of the layers. Any other becomes a stitched model of one size without anchors to name.

        Args:
            stitch_id, budget: which size; neither where this model holds one alone, or is a view of one.
            context_tokens: tokens of KV cache that a budget of memory must also hold.
            tokenizer: saved with it (for images, their processor); by default that of the bundle or of an anchor.
            plain: True refuses what is no plain model, False writes a stitched model in any case.

        Raises:
            ValueError: no such stitch, several and none named, both named, the folder is not empty, an anchor is quantised, or `plain`
                asks for what cannot be.
        """
        stitch = self._to_export(stitch_id, budget, context_tokens)
        if obstacle := self.merge_obstacle():
            raise ValueError(obstacle)
        reason = plain_obstacle(self, stitch) if plain is not False else "it was asked for as a stitched model"
        if plain and reason is not None:
            raise ValueError(
                f"stitch {stitch.stitch_id} ({stitch.key}) is no plain model: {reason}; leave plain out for a stitched one"
            )
        beside = self._beside() if tokenizer is None else tokenizer
        with new_folder(Path(folder)) as stage:
            table = self.table_to_save()
            if reason is None:
                model = plain_model(self, stitch)
                model.save_pretrained(stage)
                (stage / GENERATION).write_text(self.generation_config.to_json_string(), encoding="utf-8")
                architecture = type(model).__name__
            else:
                self._write_stitched(stage, stitch, table)
                architecture = type(self).__name__
            if beside is not None:
                beside.save_pretrained(stage)
            done = Export(Path(folder), stitch, architecture, reason)
            names = [anchor["name_or_path"] for anchor in self.config.anchors or []]
            source = self.config._name_or_path
            card = exported_card(stitch, table, names, source, architecture, reason)
            (stage / CARD).write_text(card, encoding="utf-8")
        return done

    def _to_export(self, stitch_id: int | str | None, budget: Any, context_tokens: int) -> Stitch:
        if stitch_id is not None and budget is not None:
            raise ValueError(f"stitch_id {stitch_id!r} and budget {budget!r} both given: pass one of them")
        if budget is not None:
            return self.choose(budget, context_tokens)
        if stitch_id is None and self.pinned_key is not None:
            return self.stitch(self.pinned_key)
        if stitch_id is None and len(self.keys) > 1:
            raise ValueError(f"{len(self.keys)} sizes to choose from: name one by stitch_id or budget")
        return self.stitch(self.keys[0] if stitch_id is None else stitch_id)

    def _beside(self) -> Any:
        """The tokenizer, or image processor, of the bundle this model was loaded from, or of an anchor; None where there is none."""
        load = load_tokenizer if self.can_generate() else load_processor
        names = [self.config._name_or_path, *(anchor["name_or_path"] for anchor in reversed(self.config.anchors or []))]
        for name in filter(None, names):
            try:
                return load(name)
            except ValueError as error:
                logging.getLogger(__name__).debug("%s", error)
        logging.getLogger(__name__).warning(
            "no tokenizer or image processor was found beside the bundle or its anchors: save one into the folder yourself"
        )
        return None

    def _write_stitched(self, folder: Path, stitch: Stitch, table: StitchTable) -> None:
        """One size as a stitched model that holds all weights of its route."""
        left = settings_left(biases_of(stitch, self.stitch_bias) is not None)
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        config.anchors = config.default_stitch_id = config.stitching_dtype = None
        config.keys, config.pst = [stitch.key], None if left is None else left.to_dict()
        config.auto_map = auto_map(type(self))
        self.note_dtypes(config)
        texts = {CONFIG: config.to_json_string(), CODE: code_of(type(self))}
        if self.can_generate():
            texts[GENERATION] = self.generation_config.to_json_string()
        rows = table.to_dict(config.stitch_space(), config.keys)
        write_bundle(folder, _route_tensors(self, stitch), rows, texts)


def auto_map(model_class: type) -> dict[str, str]:
    """What names the code file in `config.json`."""
    auto = "AutoModelForCausalLM" if model_class.main_input_name == "input_ids" else "AutoModelForImageClassification"
    stem = CODE.removesuffix(".py")
    return {"AutoConfig": f"{stem}.{model_class.config_class.__name__}", auto: f"{stem}.{model_class.__name__}"}


def code_of(model_class: type) -> str:
    """The code file: it only names classes of this package."""
    return _CODE.format(config=model_class.config_class.__name__, model=model_class.__name__)


def _route_tensors(model: Any, stitch: Stitch) -> dict[str, Tensor]:
    """The weights of a route, PST merged, by the name that they have in a bundle."""
    lora, merged = None if stitch.is_anchor else model.stitch_lora, {}
    for anchor in {segment.anchor for segment in stitch.segments}:
        for block, layer, _, name in adapted_layers(model, anchor):
            if (anchor, block) in stitch.blocks():
                weight = merged_weight(layer, lora and lora.factors(anchor, block, name))
                merged[id(getattr(layer, "base_layer", layer).weight)] = weight
    found = anchor_tensors(model, [stitch])
    for name in stitch.layers:
        layer = model.stitching_layers[name]
        merged[id(layer.core.weight)] = merged_weight(layer.proj)
        tensors = [*layer.named_parameters(), *layer.named_buffers()]
        found |= {f"stitching_layers.{name}.{n}": t for n, t in tensors if t.is_floating_point() and not is_low_rank(n)}
    found = {bundle_name(name): merged.get(id(tensor), tensor) for name, tensor in found.items()}
    if biases_of(stitch, model.stitch_bias) is not None:
        found[f"stitch_bias.{stitch.key}"] = model.stitch_bias.vectors[stitch.key]
    return found


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill; on leaving without an error what is in it stands at `folder`, otherwise nothing does.

    Raises:
        ValueError: something is there already.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not an empty folder: export into a new one")
    given = folder.is_dir()  # it may be where something is mounted
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = (folder if given else folder.parent) / f".{folder.name}.{uuid4().hex}"
    stage.mkdir()
    try:
        yield stage
        if given:
            for path in sorted(stage.iterdir(), key=lambda path: path.name == CONFIG):  # without which it is no model
                os.replace(path, folder / path.name)
            stage.rmdir()
        else:
            os.replace(stage, folder)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
