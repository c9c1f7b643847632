"""python -m trainer.prepare [key=value …] [--json]: prepare a run's data before the run.

A run prepares missing data itself, but the GPUs of every node wait meanwhile.
"""

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING, Any

from trainer.cli import command
from trainer.config import targets
from trainer.config.compose import compose
from trainer.core.formatting import progress, size, table
from trainer.errors import (
    DONE,
    RUN_AGAIN,
    ConfigError,
    problems_text,
)

if TYPE_CHECKING:
    from trainer.data.token_shards import Prepared

_USAGE = """usage: python -m trainer.prepare [key=value …] [--config-dir FOLDER] [--json]
  data=text data.files='data/books/**/*.txt' data.tokenizer=tokenizer.json
                the arguments of trainer.run
  --config-dir  folder with additional configuration groups
  --json        print one JSON object instead of text
If it is interrupted, finished shards stay; the same command continues.
exit codes: 0 done, or nothing to prepare, 1 the data cannot be used, 2 invalid arguments,
            75 stopped by a signal, 130 interrupted by Ctrl-C"""

_RESUME_HINT = "stopped; finished shards stay. The same command continues."
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Signals that make a run save and exit."""


class _Stopped(BaseException):
    """A stop signal, raised in the main thread so that unfinished files are removed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command(argv, _USAGE, _prepare, may_be_empty=True, interrupted=_RESUME_HINT)


def _prepare(argv: list[str]) -> int:
    is_json = "--json" in argv
    try:
        with _stoppable():
            content, text = prepare([a for a in argv if a != "--json"], is_quiet=is_json)
    except _Stopped:
        print(_RESUME_HINT, file=sys.stderr)
        return RUN_AGAIN
    print(json.dumps(content, indent=1) if is_json else text, flush=True)
    return DONE


def prepare(arguments: Sequence[str], *, is_quiet: bool) -> tuple[dict[str, Any], str]:
    """Prepare the data of a configuration; return the content for `--json`, and the text.

    Raises:
        ConfigError: the configuration or an argument is invalid.
        DataError: the data cannot be used.
    """
    run, problems = compose(arguments, _USAGE, ["--json"])
    if run.data.get("_target_"):  # merge reports a missing one
        problems += targets.check_target(run.data, "data")
    if problems:
        raise ConfigError(problems_text(problems))
    target = run.data["_target_"]
    source = targets.make(run.data, "data")  # reading a split would prepare it
    if not hasattr(type(source), "prepare"):
        return {"data": target, "is_prepared": False}, f"{target} does not need preparation"

    def log(line: str) -> None:
        if not is_quiet and not sys.stderr.isatty():  # a terminal has the progress bar
            print(line, file=sys.stderr, flush=True)

    with progress("preparing", source.total_bytes, is_quiet=is_quiet) as advance:
        prepared: Prepared = source.prepare(log, advance)
    described = {**asdict(prepared), "folder": str(prepared.folder)}
    return {"data": target, "is_prepared": True, **described}, _text(prepared)


def _text(prepared: "Prepared") -> str:
    rows = [["part", "documents", "tokens", "size", "bytes per token", "shards"]]
    for name, part in prepared.parts.items():
        counts = [f"{part.documents:,}", f"{part.tokens:,}", size(part.bytes)]
        rows.append([name, *counts, f"{part.bytes / part.tokens:.3f}", str(len(part.shards))])
    head = (
        f"folder     {prepared.folder}\n"
        f"tokenizer  {prepared.tokenizer}, {prepared.vocabulary:,} tokens as {prepared.dtype}\n"
    )
    return f"{head}\n{table(rows)}"


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turn stop signals into an exception; restore their handlers on exit."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    numbers = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
