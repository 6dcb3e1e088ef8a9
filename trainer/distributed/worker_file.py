"""The files of worker/ that the ranks share with the launcher: each stands alone, so it is loaded by its path."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

WORKER = Path(__file__).resolve().parent.parent.parent / "worker"


def load_worker(name: str) -> ModuleType:
    """Return a file of worker/ as a module."""
    spec = importlib.util.spec_from_file_location(name, WORKER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
