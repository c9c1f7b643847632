"""python -m trainer.top RUN… [every_s=2] [--once] [--json]: a live table of runs."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from trainer import cli
from trainer.cli import Arguments
from trainer.config.schema import setting
from trainer.core.formatting import age, duration, number, plain, table
from trainer.errors import DONE, PerdureError
from trainer.reporting import overview
from trainer.reporting.overview import Row
from trainer.reporting.scales import fitting

_MOST_PLACES = 1000
_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 16
_STYLES = {
    "finished": "green", "running": "bold blue", "starting": "blue", "stopped": "yellow",
    "died": "red", "silent": "red", overview.UNREADABLE: "red",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    every_s: float = setting(2.0, "seconds between updates", at_least=0.1, at_most=86400)


_USAGE = f"""usage: python -m trainer.top RUN [RUN …] [every_s=2] [--once] [--json]
  RUN      directory of a run, or a folder of runs; local or s3://…
{cli.options_text(Options, 7)}
  --once   print the table once; default without a terminal
  --json   print one JSON object, once
  store.endpoint_url=… and the other store.* settings as trainer.run has them
Ctrl-C ends it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return cli.command(argv, _USAGE, _top)


def _top(argv: list[str]) -> int:
    arguments = cli.parse(
        argv, _USAGE, Options, flags=("--once", "--json"), places=range(1, _MOST_PLACES + 1)
    )
    with suppress(KeyboardInterrupt):  # the user's way to end it
        _watch(arguments)
    return DONE


def _watch(arguments: Arguments[Options]) -> None:
    rows = _read_all(arguments, {})
    if "--json" in arguments.flags:
        print(json.dumps({"runs": [row.json() for row in rows]}, indent=1), flush=True)
    elif "--once" in arguments.flags or not sys.stdout.isatty():
        print("\n".join([table([_TITLES, *map(cells, rows)]), *_reasons(rows)]), flush=True)
    else:
        _live(arguments, rows)


def _read_all(arguments: Arguments[Options], rows_before: Mapping[str, Row]) -> list[Row]:
    """Read all runs again, several at a time, including new ones."""
    urls = [
        url
        for url_or_folder in arguments.places
        for url in overview.find(url_or_folder, arguments.store)
    ]
    return overview.read_rows(urls, arguments.store, rows_before)


def _live(arguments: Arguments[Options], rows: list[Row]) -> None:
    from rich.live import Live  # only needed on a terminal

    with Live(auto_refresh=False) as live:
        while True:
            live.update(_table(rows, live.console.width), refresh=True)
            time.sleep(arguments.options.every_s)
            try:
                rows = _read_all(arguments, {row.run: row for row in rows})
            except PerdureError as error:  # the server may recover
                live.console.print(f"error: {error}", markup=False)


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Return a line per run whose state has a reason."""
    return [plain(f"{row.run}: {row.reason}") for row in rows if row.reason]


_TITLES = [
    "run", "state", "step", "left", "loss", "lately", "evaluation", "best", "saved", "attempts",
]  # fmt: skip


def cells(row: Row) -> list[str]:
    """Return a row as cells under `_TITLES`."""
    is_early = row.state == "finished" and row.reason  # without one, it reached its last step
    state = "finished early" if is_early else row.state
    if row.since_s is not None and state not in ("running", "starting"):
        state += f" {age(row.since_s)} ago"
    step = f"{row.step:,}"
    if row.max_steps:
        step += f"/{row.max_steps:,} {100 * min(row.step / row.max_steps, 1):.0f} %"
    evaluation = f"{row.metric} {number(row.value)}" if row.metric else ""
    best = f"{row.best.metric} {number(row.best.value)} at {row.best.step:,}" if row.best else ""
    saved = ""
    if row.checkpoint_step is not None:
        saved = f"{row.checkpoint_step:,}"
        if row.checkpoint_s is not None:
            saved += f", {age(row.checkpoint_s)} ago"
    loss = number(row.losses[-1]) if row.losses else ""
    eta = "" if row.eta_s is None else duration(row.eta_s)
    titles = [row.run, state, step, eta, loss, sparkline(row.losses), evaluation, best, saved]
    return [plain(cell) for cell in [*titles, str(len(row.attempts))]]


def sparkline(values: Sequence[float], width: int = _SPARK_WIDTH) -> str:
    """Return values as a sparkline: means of neighbours on a chart's scale."""
    if not values:
        return ""
    count = min(width, len(values))
    bounds = [index * len(values) // count for index in range(count + 1)]
    means = [
        sum(value / (end - begin) for value in values[begin:end]) for begin, end in pairwise(bounds)
    ]
    scale = fitting(means, may_log=True)
    return "".join(_BLOCKS[min(int(scale(mean) * 8), 7)] for mean in means)


_NARROW = {"lately": 130, "attempts": 115, "loss": 105, "saved": 95, "evaluation": 85, "best": 75}
"""Columns hidden on terminals narrower than this many characters."""


def _table(rows: Sequence[Row], width: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    view = Table(box=None, pad_edge=False, header_style="dim")
    titles = [title for title in _TITLES if width >= _NARROW.get(title, 0)]
    for title in titles:
        align_right = title in ("step", "left", "loss", "attempts")
        view.add_column(
            title,
            justify="right" if align_right else "left",
            no_wrap=title != "run",
            overflow="fold" if title == "run" else "ellipsis",
        )
    for row in rows:
        texts = dict(zip(_TITLES, map(Text, cells(row)), strict=True))
        texts["state"].stylize(_STYLES.get(row.state, ""))
        texts["lately"].stylize("blue")
        view.add_row(*(texts[title] for title in titles))
    return view


if __name__ == "__main__":
    sys.exit(main())
