"""`metrics.jsonl`: one JSON object per line; each step exactly once, also after crashes.

`saves.jsonl` has a line for each committed checkpoint, also those of abandoned timelines. Object
stores cannot append, so an attempt writes its lines in parts there. They are joined when the next
attempt starts, at the end, and by readers.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from trainer.core.atomic_file import atomic_file
from trainer.storage import Store, local_path

FILE_NAME = "metrics.jsonl"
SAVES_NAME = "saves.jsonl"
POSITION = ("step", "epoch", "samples", "time", "split")
"""Keys of a line of metrics that are not metrics."""
_PART = r"/([0-9]{4,})-[0-9]{6}\.jsonl"
_Line = Mapping[str, Any]


class Jsonl:
    """Write metrics to `<run_dir>/metrics.jsonl` and the cost of saves to `saves.jsonl`."""

    def __init__(self) -> None:
        self._lines: _File | _Parts | None = None
        self._saves: _File | _Parts | None = None

    def start(self, facts: Mapping[str, Any]) -> None:
        """Drop lines of steps after the attempt's first step, and open the files."""
        newest = {"train": facts["step"], "eval": facts["last_eval_step"]}
        self._lines = _open(facts, FILE_NAME, lambda line: line["step"] <= newest[line["split"]])
        self._saves = _open(facts, SAVES_NAME, lambda line: True)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line."""
        if self._lines is not None:
            self._lines.append(_format(line))

    def saved(self, save: Mapping[str, Any]) -> None:
        """Append a line about a save."""
        if self._saves is not None:
            self._saves.append(_format(save))

    def message(self, text: str) -> None:
        """Do nothing; only metrics are stored."""

    def flush(self) -> None:
        """Make every line durable. Lines are complete when `log` returns, so threads do not mix."""
        for file in (self._lines, self._saves):
            if file is not None:
                file.sync()

    def close(self) -> None:
        """Flush and close."""
        for file in (self._lines, self._saves):
            if file is not None:
                file.close()
        self._lines = self._saves = None


def _open(facts: Mapping[str, Any], name: str, keep: Callable[[_Line], bool]) -> "_File | _Parts":
    if (folder := local_path(facts["run_dir"])) is not None:
        return _File(folder / name, keep)
    return _Parts(facts["store"], name, facts["attempt"], keep)


class _File:
    """File to which lines are appended.

    It starts as a new file with the valid lines, renamed over the old one: a superseded process
    that still runs then writes to a file without a name.
    """

    def __init__(self, path: Path, keep: Callable[[_Line], bool]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        text = "".join(_selected(_lines(data), keep))
        with atomic_file(path, durable=bool(text)) as file:
            file.write(text.encode())
        self._is_durable = True
        self._file: TextIO = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (close)

    def append(self, text: str) -> None:
        self._file.write(text)
        self._is_durable = False

    def sync(self) -> None:
        if not self._is_durable:
            self._is_durable = True  # before fsync, since lines may be added during it
            try:
                os.fsync(self._file.fileno())
            except OSError:
                self._is_durable = False
                raise

    def close(self) -> None:
        self.sync()
        self._file.close()


class _Parts:
    """Objects `metrics/<attempt>-<number>.jsonl`, each with the lines since the previous one."""

    def __init__(
        self, store: Store, name: str, attempt: int, keep: Callable[[_Line], bool]
    ) -> None:
        self._store, self._name, self._attempt = store, name, attempt
        self._number = 0
        self._pending: list[str] = []
        text = "".join(_selected(read(store, name), keep))
        store.replace(name, text.encode())
        store.delete([key for number, key in _parts(store, name) if number < attempt])

    def append(self, text: str) -> None:
        self._pending.append(text)

    def sync(self) -> None:
        count = len(self._pending)
        if count:
            self._number += 1
            key = f"{_folder(self._name)}/{self._attempt:04d}-{self._number:06d}.jsonl"
            self._store.replace(key, "".join(self._pending[:count]).encode())
            del self._pending[:count]

    def close(self) -> None:
        self.sync()
        text = "".join(_format(line) for line in read(self._store, self._name))
        self._store.replace(self._name, text.encode())
        parts = _parts(self._store, self._name)
        self._store.delete([key for number, key in parts if number <= self._attempt])


def read(store: Store, name: str = FILE_NAME) -> list[dict[str, Any]]:
    """Return the lines of a run, including the parts of the newest attempt that has any.

    Parts of earlier attempts were joined when it started.
    """
    try:
        lines = _lines(store.read(name))
    except FileNotFoundError:
        lines = []
    parts = _parts(store, name)
    newest = max((number for number, _ in parts), default=0)
    joined = set(map(_identity, lines))  # parts already joined but not deleted yet
    for number, key in parts:
        if number == newest:
            lines += [line for line in _lines(store.read(key)) if _identity(line) not in joined]
    return lines


@dataclass
class Salvage:
    """Readable lines of a run, for display only."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    damaged: int = 0
    """Number of damaged lines, which are skipped."""


def salvage(store: Store, name: str = FILE_NAME) -> Salvage:
    """Return every readable line, including those after a damaged one. For display only.

    `read` ends at the first damaged line, since later lines may not belong to the run's timeline.
    """
    salvaged = Salvage()
    with suppress(FileNotFoundError):
        _salvage(store.read(name), name, salvaged)
    _salvage_parts(store, name, salvaged)
    return salvaged


def newest(store: Store, max_bytes: int = 1 << 17) -> Salvage:
    """Return the metrics in about the last `max_bytes`, of any run at little cost."""
    salvaged = Salvage()
    with suppress(FileNotFoundError):
        size_bytes = store.size(FILE_NAME)
        start = max(size_bytes - max_bytes, 0)
        data = bytearray(size_bytes - start)
        count = store.read_into(FILE_NAME, start, memoryview(data))
        tail = bytes(data[:count])
        _salvage(tail.partition(b"\n")[2] if start else tail, FILE_NAME, salvaged)
    _salvage_parts(store, FILE_NAME, salvaged, max_parts=3)
    return salvaged


def _salvage_parts(
    store: Store, name: str, salvaged: Salvage, max_parts: int | None = None
) -> None:
    parts = _parts(store, name)
    newest_attempt = max((number for number, _ in parts), default=0)
    last = {_series(line): line["step"] for line in salvaged.lines}
    keys = [key for number, key in parts if number == newest_attempt]
    for key in keys if max_parts is None else keys[-max_parts:]:
        with suppress(FileNotFoundError):  # joined in the meantime
            _salvage(store.read(key), name, salvaged, after=last)


def _salvage(
    data: bytes, name: str, salvaged: Salvage, after: Mapping[object, int] | None = None
) -> None:
    for text in filter(bytes.strip, data.split(b"\n")):
        try:
            line = json.loads(text)
            step, last = line["step"], (after or {}).get(_series(line), -1)
            is_valid = name == SAVES_NAME or type(line["split"]) is str
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            is_valid = False
        if not is_valid or type(step) is not int or not 0 <= step < 1 << 63:
            salvaged.damaged += 1
        elif step > last:
            salvaged.lines.append(line)


def _series(line: _Line) -> object:
    """Return what lines with ascending steps share: their split, for saves their attempt."""
    return line.get("split", line.get("attempt"))


def read_text(store: Store, name: str = FILE_NAME) -> bytes:
    """Return the complete lines of a run, as stored."""
    if _parts(store, name):
        return "".join(map(_format, read(store, name))).encode()
    try:
        data = store.read(name)
    except FileNotFoundError:
        return b""
    return data[: data.rfind(b"\n") + 1]


def _identity(line: _Line) -> tuple[Any, ...]:
    return line.get("split"), line.get("attempt"), line["step"]


def _folder(name: str) -> str:
    return name.removesuffix(".jsonl")


def _parts(store: Store, name: str) -> list[tuple[int, str]]:
    pattern = re.compile(re.escape(_folder(name)) + _PART)
    keys = store.list(_folder(name))
    return [(int(match[1]), key) for key in keys if (match := pattern.fullmatch(key))]


def _selected(lines: Iterable[_Line], keep: Callable[[_Line], bool]) -> list[str]:
    return [_format(line) for line in lines if keep(line)]


def _format(line: _Line) -> str:
    values = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()  # JSON has no NaN and no infinity
    }
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def _lines(data: bytes) -> list[dict[str, Any]]:
    """Return the complete lines; a truncated last line is dropped."""
    lines = []
    for text in data.split(b"\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:  # not JSON, or cut inside a character
            break
    return lines
