"""Source files of Perdure, of the user, and of installed libraries."""

import sysconfig
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
"""Folder of the `trainer` package."""
_STDLIB = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
_INSTALLED = ("/site-packages/", "/dist-packages/")


def is_library(file: str) -> bool:
    """Return whether a source file belongs to Python or to an installed library."""
    return any(folder in file for folder in _INSTALLED) or file.startswith(("<", *_STDLIB))
