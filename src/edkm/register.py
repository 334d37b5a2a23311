"""Register the quantization method `edkm` with transformers, without importing it: at once if it is there, else when it comes."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_REGISTRY = "transformers.quantizers.auto"
_OURS = "edkm.compressed.quantizer"


class _Finder(MetaPathFinder):
    """Imports our module right after the registry."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (run(module), import_module(_OURS))[0]
        return spec


def register() -> None:
    """Register the method now or when transformers' registry is imported."""
    if _REGISTRY in sys.modules:
        import_module(_OURS)
    else:
        sys.meta_path.insert(0, _Finder())
