"""python -m trainer.top RUN… [every_s=2] [--once] [--json]: a live table of runs."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from trainer import cli
from trainer.cli import Arguments
from trainer.core.formatting import age, duration, number, plain, table
from trainer.core.threads import in_parallel
from trainer.errors import DONE, ConfigError, PerdureError
from trainer.reporting import board
from trainer.reporting.board import Row
from trainer.reporting.scales import SIZE, fitting

_MOST_PLACES = 1000
_MOST_AT_ONCE = 8
_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 16
_STYLES = {
    "finished": "green", "running": "bold blue", "starting": "blue", "stopped": "yellow",
    "died": "red", "silent": "red", board.UNREADABLE: "red",
}  # fmt: skip
_USAGE = """usage: python -m trainer.top RUN [RUN …] [every_s=2] [--once] [--json]
  RUN      directory of a run, or a folder of runs; local, s3://… and the like
  every_s  seconds between two looks (default 2)
  --once   print the table once; also what happens where the output is no terminal
  --json   print one JSON object, once
  store.endpoint_url=… and the other store.* settings as trainer.run has them
Ctrl-C ends it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return cli.command(argv, _USAGE, _top)


def _top(argv: list[str]) -> int:
    given = cli.parse(
        argv,
        _USAGE,
        options={"every_s": "2"},
        flags=("--once", "--json"),
        places=range(1, _MOST_PLACES + 1),
    )
    with suppress(KeyboardInterrupt):  # how one leaves it
        _watch(given, _every_s(given.options["every_s"]))
    return DONE


def _every_s(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise ConfigError(f"every_s={text}: give seconds, from 0.1 to 86400")
    return seconds


def _watch(given: Arguments, every_s: float) -> None:
    rows = _look(given, {})
    if "--json" in given.flags:
        print(json.dumps({"runs": [row.json() for row in rows]}, indent=1), flush=True)
    elif "--once" in given.flags or not sys.stdout.isatty():
        print("\n".join([table([_TITLES, *map(cells, rows)]), *_reasons(rows)]), flush=True)
    else:
        _live(given, rows, every_s)


def _look(given: Arguments, known: Mapping[str, Row]) -> list[Row]:
    """Read every run again, several at a time; runs that came meanwhile are found."""
    urls = [url for place in given.places for url in board.find(place, given.store)]
    found: dict[str, Row] = {}

    def look(url: str) -> None:
        found[url] = board.look(url, given.store, known.get(url))

    in_parallel(look, list(dict.fromkeys(urls)), _MOST_AT_ONCE)
    return board.ordered(list(found.values()))


def _live(given: Arguments, rows: list[Row], every_s: float) -> None:
    from rich.live import Live  # only where there is a terminal

    with Live(auto_refresh=False) as live:
        while True:
            live.update(_table(rows, live.console.width), refresh=True)
            time.sleep(every_s)
            try:
                rows = _look(given, {row.run: row for row in rows})
            except PerdureError as error:  # a server that is away may come back
                live.console.print(f"{type(error).__name__}: {error}", markup=False)


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Return a line for each run of whose state there is more to say."""
    return [plain(f"{row.run}: {row.why}") for row in rows if row.why]


_TITLES = ["run", "state", "step", "left", "loss", "lately", "evaluation", "saved", "attempts"]


def cells(row: Row) -> list[str]:
    """Return a row as texts, below `_TITLES`."""
    state = row.state
    if row.since_s is not None and state not in ("running", "starting"):
        state += f" {age(row.since_s)} ago"
    step = f"{row.step:,}"
    if row.max_steps:
        step += f"/{row.max_steps:,} {100 * min(row.step / row.max_steps, 1):.0f} %"
    evaluation = f"{row.metric} {number(row.value)}" if row.metric else ""
    saved = ""
    if row.checkpoint_step is not None:
        saved = f"{row.checkpoint_step:,}"
        if row.checkpoint_s is not None:
            saved += f", {age(row.checkpoint_s)} ago"
    loss = number(row.losses[-1]) if row.losses else ""
    left = "" if row.eta_s is None else duration(row.eta_s)
    shown = [row.run, state, step, left, loss, sparkline(row.losses), evaluation, saved]
    return [plain(cell) for cell in [*shown, str(len(row.attempts))]]


def sparkline(values: Sequence[float], width: int = _SPARK_WIDTH) -> str:
    """Return values as a row of blocks: means of neighbours, on the scale that charts have."""
    if not values:
        return ""
    count = min(width, len(values))
    bounds = [index * len(values) // count for index in range(count + 1)]
    means = [
        sum(value / (end - begin) for value in values[begin:end]) for begin, end in pairwise(bounds)
    ]
    scale = fitting(means, may_log=True)
    return "".join(_BLOCKS[min(int(scale(mean) / SIZE * 8), 7)] for mean in means)


_NARROW = {"lately": 130, "attempts": 115, "loss": 105, "saved": 95, "evaluation": 75}
"""Columns that a terminal of fewer characters does without."""


def _table(rows: Sequence[Row], width: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="dim")
    shown = [title for title in _TITLES if width >= _NARROW.get(title, 0)]
    for title in shown:
        right = title in ("step", "left", "loss", "attempts")
        made.add_column(
            title,
            justify="right" if right else "left",
            no_wrap=title != "run",
            overflow="fold" if title == "run" else "ellipsis",
        )
    for row in rows:
        texts = dict(zip(_TITLES, map(Text, cells(row)), strict=True))
        texts["state"].stylize(_STYLES.get(row.state, ""))
        texts["lately"].stylize("blue")
        made.add_row(*(texts[title] for title in shown))
    return made


if __name__ == "__main__":
    sys.exit(main())
