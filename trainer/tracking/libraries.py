"""Whether a library is there that only some trackers need."""

import importlib.util


def missing(library: str, extra: str) -> str:
    """Return what to do if `library` is not installed, else an empty text. Imports nothing."""
    spec = importlib.util.find_spec(library)
    if spec is not None and spec.origin is not None:  # a folder of that name has no origin
        return ""
    return f"needs the library {library}, which is not installed: pip install 'perdure[{extra}]'"
