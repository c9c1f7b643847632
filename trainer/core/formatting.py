"""What the commands show on a terminal: tables, sizes, ages, a bar, a question."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from trainer.errors import ConfigError


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns; the first row has their titles. Columns of numbers go to the right."""
    rows = [[plain(cell) for cell in row] for row in rows]
    columns = range(len(rows[0]))
    widths = [max(len(row[i]) for row in rows) for i in columns]
    is_number = [
        len(rows) > 1 and all(not row[i] or row[i][0].isdigit() for row in rows[1:])
        for i in columns
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def plain(text: str) -> str:
    """Return a name from a file without what would move the cursor or change colours."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size(count_bytes: float) -> str:
    """Return `12.3 MB` and the like; units are powers of 1000."""
    power, units = 0, ("B", "kB", "MB", "GB", "TB", "PB")
    while count_bytes >= 999.5 and power < len(units) - 1:
        count_bytes, power = count_bytes / 1000, power + 1
    return f"{count_bytes:.3g} {units[power]}"


def counted(count: int, word: str) -> str:
    """Return `1 folder`, `2 folders` and the like."""
    return f"{count:,} {word}" + "s" * (count != 1)


def age(since_s: float) -> str:
    """Return how long ago this was, in one unit; `since_s` counts from 1970."""
    seconds = max(time.time() - since_s, 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def iso(seconds: float) -> str:
    """Return seconds since 1970 as ISO 8601, UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def short(value: Any) -> str:
    """Return a value as Python writes it, cut to one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def ask(question: str, *, is_agreed: bool) -> None:
    """Return only if somebody says yes, or has said so before.

    Raises:
        ConfigError: nobody did.
    """
    if is_agreed:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigError(f"{question}? Nothing was deleted; --yes does it without asking")
    print(f"{question}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was deleted")


@contextmanager
def progress(what: str, total_bytes: int, *, is_quiet: bool) -> Iterator[Callable[[int], object]]:
    """Show a bar, if standard error is a terminal; yield what is told of every few bytes."""
    if is_quiet or not sys.stderr.isatty():
        yield lambda done_bytes: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda done_bytes: bar.advance(task, done_bytes)
