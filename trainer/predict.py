"""python -m trainer.predict EXPORT input=… [out=…]: run an export, or compare two."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cli import Arguments, command, options_text, parse
from trainer.config import targets
from trainer.config.compose import compose, config_folders
from trainer.config.schema import setting
from trainer.core.formatting import pluralize
from trainer.errors import DONE, ConfigError, problems_text
from trainer.export.destination import local_copy
from trainer.export.formats import open_export

if TYPE_CHECKING:
    from trainer.export.inputs import Batch, InputSpec

_RUN_KEYS = ("data", "sample")


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    model: str = setting("", "the same as EXPORT")
    input: str = setting("", "images (a file, a folder, a pattern), .npy, .npz, or an IDX file")
    out: str = setting("", "output file: .npz for the arrays, or else JSON Lines")
    device: str = setting("cpu", "cpu or cuda")
    batch_size: int = setting(64, "inputs per batch", at_least=1)
    top: int = setting(1, "classes per input", at_least=1)
    trusted: bool = setting(
        False, "true: open a pickled module (format=full_model), which can run any code"
    )


_USAGE = f"""usage: python -m trainer.predict EXPORT input=… [out=…] [device=…] [top=…]
       python -m trainer.predict EXPORT data=… [data.x=…] [--config-dir FOLDER]
       python -m trainer.predict EXPORT OTHER --compare input=…
  EXPORT      export in a format that can be run, from python -m trainer.export
  data        data group as in trainer.run: its evaluation split, with the accuracy
{options_text(Options, 10)}
  --config-dir  folder with additional configuration groups for data=…, as in trainer.run
  --compare   run two exports on the same inputs: differences, same classes, and speeds"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command(argv, _USAGE, _predict)


def _predict(argv: list[str]) -> int:
    argv, config_dirs = config_folders(argv, _USAGE)
    settings = [a for a in argv if a.partition("=")[0].partition(".")[0] in _RUN_KEYS]
    arguments = [a for a in argv if a not in settings]
    parsed = parse(arguments, _USAGE, Options, flags=("--compare",), places=(0, 1, 2))
    options, is_comparison = parsed.options, "--compare" in parsed.flags
    urls = [*parsed.places, *filter(None, [options.model])]
    count = 2 if is_comparison else 1
    if len(urls) != count:
        needed = pluralize(count, "export")
        raise ConfigError(f"{needed} needed, {len(urls)} given\n{_USAGE}")
    from trainer.export.inputs import InputSpec  # imports torch, which --help does not need
    from trainer.export.predicting import compare_exports, predict, report

    with local_copy(urls[0], parsed.store) as path:
        model = open_export(path, options.device, trusted=options.trusted)
        spec = InputSpec.of(path)
        batches = _batches(parsed, settings, config_dirs, spec, spec.batch_size)
        if is_comparison:
            with local_copy(urls[1], parsed.store) as other_path:
                other = open_export(other_path, options.device, trusted=options.trusted)
                print(compare_exports(model, other, batches, urls))
        else:
            print(report(predict(model, batches, spec), spec, options.out, options.top))
    return DONE


def _batches(
    parsed: "Arguments[Options]",
    settings: Sequence[str],
    config_dirs: Sequence[Path],
    spec: "InputSpec",
    batch_size: int | None,
) -> "Iterator[Batch]":
    from trainer.export import inputs  # imports torch
    from trainer.training import build

    location = parsed.options.input
    batch_size = batch_size or parsed.options.batch_size
    if bool(location) == bool(settings):
        raise ConfigError(f"give either input=… or data=…\n{_USAGE}")
    if location:
        return inputs.read(location, spec, batch_size)
    run, problems = compose([*(f"--config-dir={f}" for f in config_dirs), *settings], _USAGE)
    problems += targets.check_target(run.data, "data")
    if problems:
        raise ConfigError(problems_text(problems))
    return inputs.evaluation_batches(build.build_data(run), spec, batch_size)


if __name__ == "__main__":
    sys.exit(main())
