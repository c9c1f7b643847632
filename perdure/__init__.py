"""Perdure under its own name: the same objects as `trainer`, imported when they are used.

For projects that have a module or package called `trainer` themselves.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_PROTOCOLS = ("DataSource", "Task", "Tracker")
_MODULES = (
    "checkpoint", "data", "errors", "export", "protocols", "schedule", "task", "tracking",
)  # fmt: skip


def import_trainer() -> ModuleType:
    """Import the `trainer` next to this package, also if the working directory has one too."""
    folder = str(Path(__file__).resolve().parents[1])
    sys.path.insert(0, folder)
    try:
        trainer = importlib.import_module("trainer")
    finally:
        sys.path.remove(folder)
    if not str(getattr(trainer, "__file__", "")).startswith(folder):
        raise ImportError(
            f"the module `trainer` is {trainer.__file__}, which hides Perdure's: import perdure "
            "before it, or rename it"
        )
    return trainer


def __getattr__(name: str) -> Any:
    if name in _PROTOCOLS:
        import_trainer()
        return getattr(importlib.import_module("trainer.protocols"), name)
    if name in _MODULES:
        import_trainer()
        return importlib.import_module(f"trainer.{name}")
    raise AttributeError(f"module 'perdure' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PROTOCOLS, *_MODULES])
