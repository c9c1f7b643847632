"""python -m trainer.export RUN [format=…] [step=…] [weights=…] [out=…]: a model leaves its run."""

import math
import sys
from collections.abc import Sequence

from trainer.cli import Arguments, command, parse
from trainer.errors import DONE, ConfigError, closest
from trainer.export.exporting import Exported, export
from trainer.export.formats import FORMATS, find
from trainer.export.subject import Choices

_WEIGHTS = ("model", "ema")
_OPTIONS = {
    "format": "safetensors", "step": "latest", "weights": "model", "out": "", "dtype": "",
    "part": "", "inputs": "", "device": "cpu", "allow": "", "atol": "", "rtol": "",
}  # fmt: skip
_USAGE = f"""usage: python -m trainer.export RUN [format=…] [step=…] [weights=…] [out=…] […]
  RUN      directory of a run, a folder of checkpoints, or one of them; local, s3://… and the like
  format   {", ".join(FORMATS)}
           (default safetensors)
  step     latest, best, or the number of a step that the run has kept (default latest)
  weights  model, or ema: their moving average, where trainer.ema_decay was set (default model)
  out      file or folder to write (default RUN/exports/step-N.<suffix of the format>)
  dtype    fp32, fp16 or bf16, of what is floating-point (default: as it is)
  part     submodule that is exported alone, such as generator (default: the whole model)
  allow    packages or names, with commas between, that the checkpoint's configuration may call
           besides this project's own and torch.nn
  x.y      a setting of the run to change, such as data.dir=/elsewhere
What can be run is compared with the model, and not written where it differs:
  inputs   what the model takes, as random values, such as 'tokens:int64[128]<50257;mask:bool[128]'
           (default: evaluation data, as the task hands it to the model)
  device   cpu or cuda: where the model is traced and compared (default cpu)
  atol     allowed difference of an output (default by dtype: 1e-5 for fp32)
  rtol     the same in shares of the output's largest value (default by dtype: 1e-4 for fp32)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command(argv, usage(), _run)


def _run(argv: list[str]) -> int:
    settings = [argument for argument in argv if _is_setting(argument)]
    named = [a.partition("=")[2] for a in argv if a.startswith("format=")]
    find(named[-1] if named else _OPTIONS["format"])
    unset = {key: "" for each in FORMATS.values() for key in each.OPTIONS}
    mine = [argument for argument in argv if not _is_setting(argument)]
    given = parse(mine, usage(), options={**_OPTIONS, **unset})
    done = _export(given, settings)
    print(text(done))
    if done.warning:
        print(done.warning, file=sys.stderr)
    return DONE


def usage() -> str:
    """Return the text of --help, with the options of every format."""
    lines = [_USAGE]
    for name, module in FORMATS.items():
        if module.OPTIONS:
            lines.append(f"Options of format={name}:")
        width = max(8, *map(len, module.OPTIONS), 0)
        for key, default in module.OPTIONS.items():
            lines.append(f"  {key:<{width}} {module.HELP[key]}")
            lines.append(f"{'':<{width + 3}}(default {default or 'empty'})")
    return "\n".join(lines)


def text(done: Exported) -> str:
    """Return what a person reads of an export."""
    lines = [f"{done.url}: {done.tensors:,} tensors, {done.bytes:,} bytes"]
    if done.differences is not None:
        compared = done.record["parity"]
        sizes = ", ".join(map(str, compared["batch_sizes"]))
        lines.append(f"compared with the model on {compared['samples']}, batches of {sizes}:")
        lines += [f"  {difference}" for difference in done.differences]
    return "\n".join(lines)


def _export(given: Arguments, settings: Sequence[str]) -> Exported:
    options = given.options
    weights = options["weights"]
    if weights not in _WEIGHTS:
        raise ConfigError(f"weights={weights} is neither model nor ema{closest(weights, _WEIGHTS)}")
    choices = Choices(
        averaged=weights == "ema",
        dtype=options["dtype"],
        device=options["device"],
        part=options["part"],
        inputs=options["inputs"],
        settings=settings,
        allowed=[name for name in options["allow"].split(",") if name],
    )
    return export(
        given.places[0],
        options["format"],
        options["step"],
        options["out"],
        choices=choices,
        options={key: value for key, value in options.items() if key not in _OPTIONS and value},
        atol=_number("atol", options["atol"]),
        rtol=_number("rtol", options["rtol"]),
        store=given.store,
    )


def _number(key: str, text: str) -> float | None:
    try:
        number = float(text) if text else None
    except ValueError:
        number = math.nan
    if number is not None and not number >= 0:
        raise ConfigError(f"{key}={text} is no number from 0 on; write one such as {key}=1e-3")
    return number


def _is_setting(argument: str) -> bool:
    """Whether it changes a setting of the run: a dotted key that is not the store's."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and "." in key and "/" not in key and not key.startswith(("-", "store."))


if __name__ == "__main__":
    sys.exit(main())
