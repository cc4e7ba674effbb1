"""Tells Transformers' AutoConfig the stitched model types, by name alone.

Transformers imports `transformers.models.<model type>` when it first needs the configuration class of a model type; for a
stitched one it finds this package there, which imports the class then. So nothing is imported while Transformers is half
imported itself. The model classes are registered by `stitched_llama.models`, where their configurations come from.
"""

import importlib
import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

CONFIGS = {
    "stitched_llama": "StitchedLlamaConfig",
    "stitched_vit": "StitchedViTConfig",
    "stitched_swin": "StitchedSwinConfig",
    "stitched_convnext": "StitchedConvNextConfig",
    "stitched_resnet": "StitchedResNetConfig",
    "stitched_dinov2": "StitchedDinov2Config",
    "stitched_mobilenet_v2": "StitchedMobileNetV2Config",
    "stitched_mixed": "StitchedMixedConfig",
}
_AUTO = "transformers.models.auto.configuration_auto"


class _AfterAuto(importlib.abc.MetaPathFinder):
    """Adds the names as soon as the module of AutoConfig is executed, by whatever loader it has."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _AUTO:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_add(module: ModuleType) -> None:
                execute(module)
                _add_names(module)

            loader.exec_module = execute_and_add
        return spec


def _add_names(auto: ModuleType) -> None:
    auto.CONFIG_MAPPING_NAMES.update(CONFIGS)
    for model_type in CONFIGS:
        sys.modules[f"transformers.models.{model_type}"] = sys.modules[__package__]


def register() -> None:
    if _AUTO in sys.modules:
        _add_names(importlib.import_module(_AUTO))  # waits where another thread is importing it
    elif not any(isinstance(finder, _AfterAuto) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterAuto())
