"""Source files of Perdure, of the user, and of installed libraries."""

import sysconfig
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
"""Folder of the `trainer` package."""
_STDLIB = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))


def is_library(file: str) -> bool:
    """Return whether a source file belongs to Python or to an installed library."""
    parts = Path(file).parts
    is_installed = "site-packages" in parts or "dist-packages" in parts
    return is_installed or file.startswith(("<", *_STDLIB))
