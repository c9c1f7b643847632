"""`metrics.jsonl`: one JSON object a line, no step twice and none missing, whatever died."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

FILE_NAME = "metrics.jsonl"


class Jsonl:
    """Appends lines to `<run_dir>/metrics.jsonl`."""

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def start(self, facts: Mapping[str, Any]) -> None:
        """Cut the file back to the step that the attempt starts from, then open it to append.

        The shorter file is a new one, renamed over the old: a process that should be dead but is
        not goes on writing into a file that no longer has a name.
        """
        path = Path(facts["run_dir"]) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        newest = {"train": facts["step"], "eval": facts["last_eval_step"]}
        kept = [line for line in _lines(path) if line["step"] <= newest[line["split"]]]
        temporary = path.with_name(f".tmp-{FILE_NAME}")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(_format(line) for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (close)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line."""
        if self._file is not None:
            self._file.write(_format(line))

    def say(self, text: str) -> None:
        """Ignored: only figures are kept."""

    def flush(self) -> None:
        """Fsync. Every line has left Python's buffer when `log` returned, so threads cannot mix."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None


def _format(line: Mapping[str, Any]) -> str:
    values = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()  # JSON has no NaN and no infinity
    }
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of the file; a last line that was cut short by a kill is dropped."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:  # not JSON, or cut inside a character
            break
    return lines
