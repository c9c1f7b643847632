"""Text for people: numbers, sizes, durations, tables, a progress bar and a yes/no question."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from trainer.errors import ConfigError


def number(value: float | None, digits: int = 4) -> str:
    """Format a number with `digits` significant digits: 12,345 or 0.9861 or 9.6e-9; None: –."""
    if value is None:
        return "–"
    if abs(value) >= 1 << 1000 or not math.isfinite(value):  # a damaged file may hold any integer
        return str(value) if isinstance(value, float) else "…"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    magnitude = abs(value)
    if magnitude < 1e-4 or magnitude >= 1e15:
        mantissa, _, power = f"{value:.{digits - 2}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(power)}"
    decimals = max(digits - 1 - math.floor(math.log10(magnitude)), 0)
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def integer(value: object) -> str:
    """Format an integer with thousands separators; anything else: –."""
    return f"{value:,}" if type(value) is int else "–"


def compact(value: float) -> str:
    """Format a number in few characters: 12k, 3.4M, 0.05."""
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if factor <= abs(value) < 1e15:
            return f"{number(value / factor, 3)}{unit}"
    return number(value)


def size(size_bytes: float) -> str:
    """Format bytes in powers of 1000: 12.3 MB."""
    power, units = 0, ("B", "kB", "MB", "GB", "TB", "PB")
    while size_bytes >= 999.5 and power < len(units) - 1:
        size_bytes, power = size_bytes / 1000, power + 1
    return f"{size_bytes:.3g} {units[power]}"


def duration(seconds: float | None) -> str:
    """Format seconds: 0.2 ms, 12.3 s, 4 min 5 s, 3 h 20 min, 2 d 4 h; None or infinite: –."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 0.1:
        return f"{number(1000 * seconds, 3)} ms"
    if seconds < 60:
        return f"{number(round(seconds, 1 if seconds >= 10 else 2))} s"
    for unit, length, smaller, part in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if seconds >= length:
            rest = int(seconds % length // part)
            return f"{int(seconds // length):,} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds:.0f} s"


def age(since_s: float) -> str:
    """Format the time since `since_s`, seconds since 1970, in one unit: 3 h."""
    seconds = max(time.time() - since_s, 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def iso(seconds: float) -> str:
    """Format seconds since 1970 as ISO 8601, UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def pluralize(count: int, noun: str) -> str:
    """Format a count with its noun: 1 step, 2 steps, 2 batches."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{count:,} {noun}" + ("" if count == 1 else plural)


def listing(names: Sequence[str], limit: int) -> str:
    """Join at most `limit` names: a, b and 3 more; `nothing` without names."""
    rest = len(names) - limit
    return (", ".join(names[:limit]) or "nothing") + (f" and {rest:,} more" if rest > 0 else "")


def short_repr(value: Any) -> str:
    """Return `repr(value)`, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain(text: str) -> str:
    """Escape characters that would move the cursor or change colours on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns; the first row has the titles. Numeric columns are right-aligned."""
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


def ask(question: str, *, is_agreed: bool) -> None:
    """Return if the user answers yes, or `is_agreed` already.

    Raises:
        ConfigError: the user declines, or standard input is not a terminal.
    """
    if is_agreed:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigError(f"{question}? Nothing was deleted; --yes does it without asking")
    print(f"{question}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was deleted")


@contextmanager
def progress(
    description: str, total_bytes: int, *, is_quiet: bool
) -> Iterator[Callable[[int], object]]:
    """Show a progress bar if standard error is a terminal; yield a function that adds bytes."""
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
        task = bar.add_task(description, total=total_bytes)
        yield lambda done_bytes: bar.advance(task, done_bytes)
