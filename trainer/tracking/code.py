"""Git version of the code that started a run."""

import subprocess
from typing import Any

_PATIENCE_S = 10.0


def version(folder: str) -> dict[str, Any]:
    """Return `commit` and `dirty` (whether tracked files differ from it) of a git work tree.

    Empty if `folder` is not in a work tree, or git fails or times out.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return {}
    return {"commit": commit, "dirty": bool(changes)}


def _git(folder: str, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", folder, *arguments]
    try:
        process = subprocess.run(  # noqa: S603 (fixed arguments)
            command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() if process.returncode == 0 else None
