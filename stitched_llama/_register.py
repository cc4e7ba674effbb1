"""Registers the stitched classes with Transformers' Auto classes, without importing Transformers for it.

Where Transformers' Auto classes are loaded already they are registered at once; else as soon as they are.
"""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

_AUTO = "transformers.models.auto"


class _AfterAuto(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets the Auto classes load as they would, then imports `stitched_llama.models`, which registers itself."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module("stitched_llama.models")


def register() -> None:
    if _AUTO in sys.modules:
        importlib.import_module("stitched_llama.models")
    elif not any(isinstance(finder, _AfterAuto) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterAuto())
