"""python -m trainer.predict EXPORT input=… [out=…]: run an export, or compare two."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cli import Arguments, command, parse
from trainer.config import targets
from trainer.config.compose import compose, config_folders
from trainer.core.formatting import pluralize
from trainer.errors import DONE, ConfigError, problems_text
from trainer.export.contract import is_true
from trainer.export.destination import local_copy
from trainer.export.formats import open_export

if TYPE_CHECKING:
    from trainer.export.inputs import Batch, InputSpec

_OPTIONS = {
    "model": "", "input": "", "out": "", "device": "cpu", "batch_size": "64", "top": "1",
    "trusted": "false",
}  # fmt: skip
_RUN_KEYS = ("data", "sample")
_USAGE = """usage: python -m trainer.predict EXPORT input=… [out=…] [device=…] [top=…]
       python -m trainer.predict EXPORT data=… [data.x=…] [--config-dir FOLDER]
       python -m trainer.predict EXPORT OTHER --compare input=…
  EXPORT      export in a format that can be run, from python -m trainer.export (or model=EXPORT)
  input       images (a file, a folder, a pattern), .npy, .npz, or an IDX file
  data        data group as in trainer.run: its evaluation split, with the accuracy
  out         output file: .npz for the arrays, or else JSON Lines
  device      cpu or cuda (default cpu)
  batch_size  inputs per batch (default 64)
  top         classes per input (default 1)
  --config-dir  folder with additional configuration groups for data=…, as in trainer.run
  trusted     true: open a pickled module (format=full_model), which can run any code
  --compare   run two exports on the same inputs: differences, same classes, and speeds"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command(argv, _USAGE, _predict)


def _predict(argv: list[str]) -> int:
    argv, config_dirs = config_folders(argv, _USAGE)
    settings = [a for a in argv if a.partition("=")[0].partition(".")[0] in _RUN_KEYS]
    arguments = [a for a in argv if a not in settings]
    parsed = parse(arguments, _USAGE, options=_OPTIONS, flags=("--compare",), places=(0, 1, 2))
    options, is_comparison = parsed.options, "--compare" in parsed.flags
    urls = [*parsed.places, *filter(None, [options["model"]])]
    count = 2 if is_comparison else 1
    if len(urls) != count:
        needed = pluralize(count, "export")
        raise ConfigError(f"{needed} needed, {len(urls)} given\n{_USAGE}")
    device, batch_size = options["device"], _count(parsed, "batch_size")
    trusted, top = is_true(options, "trusted"), _count(parsed, "top")
    from trainer.export.inputs import InputSpec  # imports torch, which --help does not need
    from trainer.export.predicting import compare_exports, predict, report

    with local_copy(urls[0], parsed.store) as path:
        model = open_export(path, device, trusted=trusted)
        spec = InputSpec.of(path)
        batches = _batches(parsed, settings, config_dirs, spec, spec.batch_size or batch_size)
        if is_comparison:
            with local_copy(urls[1], parsed.store) as other_path:
                other = open_export(other_path, device, trusted=trusted)
                print(compare_exports(model, other, batches, urls))
        else:
            print(report(predict(model, batches, spec), spec, options["out"], top))
    return DONE


def _count(parsed: Arguments, key: str) -> int:
    text = parsed.options[key]
    if not (text.isdecimal() and int(text) >= 1):
        raise ConfigError(f"{key}={text} is not an integer of 1 or more")
    return int(text)


def _batches(
    parsed: Arguments,
    settings: Sequence[str],
    config_dirs: Sequence[Path],
    spec: "InputSpec",
    batch_size: int,
) -> "Iterator[Batch]":
    from trainer.export import inputs  # imports torch
    from trainer.training import build

    location = parsed.options["input"]
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
