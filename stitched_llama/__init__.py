"""Stitched LLaMA: one fine-tune of two or more frozen models, every size between them.

space     1  stitches, ids, exact costs, budgets; standard library only
layers    1  stitching layers, streamed least squares; torch only
sampling  2  importance scores and draws; standard library only
anchors   2  the only code that touches a backbone's inside
pst       2  what trains: LoRA, low-rank stitching update, stitch bias
bundles   2  the file format: JSON and safetensors, written atomically
models    3  Hugging Face names, the route walk, generate, calibrate, load, save
training  4  arguments, data, Trainer, evaluation of every stitch, plots
shrinking 5  a small anchor cut out of a large model and distilled
recipes   6  whole runs, each a script that reads top to bottom
cli       7  the command stitched-llama: recipes, space, bundle, chat

A room imports only from rooms of a lower number (pst also reads anchors). Importing this package loads neither torch
nor transformers until a name needs them.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Budget": "space",
    "Precision": "space",
    "Stitch": "space",
    "StitchSpace": "space",
    "StitchTable": "space",
    "PSTConfig": "pst",
    "palette_gain": "space",
    "StitchSampler": "sampling",
    "Importance": "sampling",
    "Calibration": "models",
    "StitchedLlamaConfig": "models",
    "StitchedLlamaForCausalLM": "models",
    "StitchedViTConfig": "models",
    "StitchedViTForImageClassification": "models",
    "StitchedSwinConfig": "models",
    "StitchedSwinForImageClassification": "models",
    "StitchedConvNextConfig": "models",
    "StitchedConvNextForImageClassification": "models",
    "StitchedResNetConfig": "models",
    "StitchedResNetForImageClassification": "models",
    "StitchedDinov2Config": "models",
    "StitchedDinov2ForImageClassification": "models",
    "StitchedMobileNetV2Config": "models",
    "StitchedMobileNetV2ForImageClassification": "models",
    "StitchedMixedConfig": "models",
    "StitchedMixedForImageClassification": "models",
    "StitchImageTrainer": "training",
    "StitchTrainer": "training",
    "StitchTrainingArguments": "training",
    "evaluate_stitches": "training",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


from stitched_llama import _register  # noqa: E402

_register.register()
