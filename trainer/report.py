"""python -m trainer.report RUN [A B …] [out=…]: one HTML page of a run, or of several together."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from trainer import cli, reporting
from trainer.config.schema import setting
from trainer.errors import DONE

_MOST_PLACES = 1000


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    out: str = setting(
        "", "file to write (default: report.html in the run; of several, compare.html here)"
    )


_USAGE = f"""usage: python -m trainer.report RUN [RUN …] [out=…]
  RUN   directory of a run, or a folder of runs; local, s3://… and the like. Several runs are
        compared; those of a folder are ranked by best value, and the best 40 shown
{cli.options_text(Options, 4)}
  store.endpoint_url=… and the other store.* settings as trainer.run has them
The page is one file that needs no network; open it in a browser, or send it to others."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return cli.command(argv, _USAGE, _report)


def _report(argv: list[str]) -> int:
    arguments = cli.parse(argv, _USAGE, Options, places=range(1, _MOST_PLACES + 1))
    url = reporting.write(arguments.places, arguments.options.out or None, arguments.store)
    print(f"wrote {url}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
