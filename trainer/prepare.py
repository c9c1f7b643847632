"""python -m trainer.prepare [key=value …] [--json]: prepare a run's data before the run.

A run prepares its data itself where that was not done; but then every node's GPUs wait for it.
"""

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any

from trainer.cli import command
from trainer.config import targets
from trainer.config.compose import compose
from trainer.core.formatting import progress, size, table
from trainer.data.token_shards import Prepared
from trainer.errors import (
    DONE,
    RUN_AGAIN,
    ConfigError,
    problems_text,
)

_USAGE = """usage: python -m trainer.prepare [key=value …] [--config-dir FOLDER] [--json]
  data=text data.files='data/books/**/*.txt' data.tokenizer=tokenizer.json
                the configuration as trainer.run has it: give the run's own arguments
  --config-dir  a folder with more groups, as trainer.run has it
  --json        one JSON object on standard output instead of text
Killed in the middle, it keeps what is finished; the same command goes on.
exit codes: 0 done, or nothing to prepare, 1 the data cannot be used, 2 not understood,
            75 stopped by a signal, 130 interrupted by Ctrl-C"""

_LEFT = "LEFT: what is finished is kept. The same command goes on."
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Those that mean to a run: save and leave."""


class _Stopped(BaseException):
    """A signal has come; raised where the work is, so that it leaves no half file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command(argv, _USAGE, _prepare, may_be_empty=True, interrupted=_LEFT)


def _prepare(argv: list[str]) -> int:
    is_json = "--json" in argv
    try:
        with _stoppable():
            content, text = prepare([a for a in argv if a != "--json"], is_quiet=is_json)
    except _Stopped:
        print(_LEFT, file=sys.stderr)
        return RUN_AGAIN
    print(json.dumps(content, indent=1) if is_json else text, flush=True)
    return DONE


def prepare(arguments: Sequence[str], *, is_quiet: bool) -> tuple[dict[str, Any], str]:
    """Prepare the data of a configuration; return what `--json` prints, and the text without.

    Raises:
        ConfigError: the configuration, or an argument, has to change.
        DataError: the data cannot be used.
    """
    run, problems = compose(arguments, _USAGE, ["--json"])
    if run.data.get("_target_"):  # merge tells where there is none
        problems += targets.check_target(run.data, "data")
    if problems:
        raise ConfigError(problems_text(problems))
    target = run.data["_target_"]
    source = targets.make(run.data, "data")  # and look at no part of it: that would prepare it
    if not hasattr(type(source), "prepare"):
        return {"data": target, "is_prepared": False}, f"{target} needs no preparing"

    def say(line: str) -> None:
        if not is_quiet and not sys.stderr.isatty():  # a terminal has the bar
            print(line, file=sys.stderr, flush=True)

    with progress("preparing", source.total_bytes, is_quiet=is_quiet) as advance:
        prepared: Prepared = source.prepare(say, advance)
    described = {**asdict(prepared), "folder": str(prepared.folder)}
    return {"data": target, "is_prepared": True, **described}, _text(prepared)


def _text(prepared: Prepared) -> str:
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
    """Turn signals that mean to stop into an exception, and put their handlers back."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
