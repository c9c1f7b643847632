"""Check for optional libraries of trackers."""

import importlib.util


def missing(library: str, extra: str) -> str:
    """Return an instruction if `library` is not installed, else an empty string. No imports."""
    spec = importlib.util.find_spec(library)
    if spec is not None and spec.origin is not None:  # a folder of that name has no origin
        return ""
    return f"needs the library {library}, which is not installed: pip install 'perdure[{extra}]'"
