"""python -m trainer.export RUN [format=…] [step=…] [weights=…] [out=…]: export a checkpoint."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.cli import Arguments, command, options_text, parse
from trainer.config.schema import setting
from trainer.errors import DONE
from trainer.export.formats import FORMATS, find

if TYPE_CHECKING:
    from trainer.export.exporting import Exported


@dataclass(frozen=True)
class ModelOptions:
    """Options that choose what is exported, and to where."""

    format: str = setting("safetensors", ", ".join(FORMATS))
    step: str = setting("latest", "latest, best, or a step number")
    weights: str | None = setting(
        None,
        "model, or ema: the averages of runs with trainer.ema_decay or an optimizer with an "
        "evaluation mode (default: ema with an evaluation mode, as the run evaluates; else model)",
        choices=("model", "ema"),
    )
    out: str = setting(
        "", "file or folder to write (default RUN/exports/step-N.<suffix of the format>)"
    )
    dtype: str = setting("", "fp32, fp16 or bf16, for floating-point tensors (default: unchanged)")
    part: str = setting("", "submodule to export, such as generator (default: the complete model)")
    allow: str = setting(
        "",
        "packages or names, separated by commas, that the checkpoint's configuration may call in "
        "addition to this project's and torch.nn",
    )


@dataclass(frozen=True)
class ComparisonOptions:
    """Options of the comparison with the model."""

    inputs: str = setting(
        "",
        "random inputs to use, such as 'tokens:int64[128]<50257;mask:bool[128]' (default: "
        "evaluation data, as the task passes it to the model)",
    )
    device: str = setting("cpu", "cpu or cuda: device of the trace and the comparison")
    atol: float | None = setting(
        None, "absolute tolerance of an output (default by dtype: 1e-5 for fp32)", at_least=0
    )
    rtol: float | None = setting(
        None,
        "tolerance relative to the output's largest value (default by dtype: 1e-4 for fp32)",
        at_least=0,
    )


@dataclass(frozen=True)
class Options(ComparisonOptions, ModelOptions):
    """All options that every format has."""


_USAGE = f"""usage: python -m trainer.export RUN [format=…] [step=…] [weights=…] [out=…] […]
  RUN      run directory, folder of checkpoints, or one checkpoint; local, s3://… etc.
{options_text(ModelOptions, 7)}
  x.y      override a configuration key of the run, such as data.dir=/elsewhere
Formats that can be run are compared with the model, and not written if the outputs differ:
{options_text(ComparisonOptions, 7)}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command(argv, usage(), _run)


def _run(argv: list[str]) -> int:
    settings = [argument for argument in argv if _is_setting(argument)]
    arguments = [argument for argument in argv if not _is_setting(argument)]
    formats = [a.removeprefix("format=") for a in argv if a.startswith("format=")]
    find(formats[-1] if formats else Options.format)
    format_options = {key for format in FORMATS.values() for key in format.options}
    parsed = parse(arguments, usage(), Options, texts=format_options)
    result = _export(parsed, settings)
    print(text(result))
    if result.warning:
        print(result.warning, file=sys.stderr)
    return DONE


def usage() -> str:
    """Return the text of --help, with the options of every format."""
    lines = [_USAGE]
    for name, format in FORMATS.items():
        if format.options:
            lines.append(f"Options of format={name}:")
        width = max(8, *map(len, format.options), 0)
        for key, option in format.options.items():
            lines.append(f"  {key:<{width}} {option.help}")
            lines.append(f"{'':<{width + 3}}(default {option.default or 'empty'})")
    return "\n".join(lines)


def text(result: "Exported") -> str:
    """Format the result of an export."""
    averages = ", averaged weights" if result.record["weights"] == "ema" else ""
    lines = [f"{result.url}: {result.tensors:,} tensors, {result.bytes:,} bytes{averages}"]
    if result.mismatches is not None:
        parity = result.record["parity"]
        sizes = ", ".join(map(str, parity["batch_sizes"]))
        lines.append(f"compared with the model on {parity['samples']}, batches of {sizes}:")
        lines += [f"  {mismatch}" for mismatch in result.mismatches]
    return "\n".join(lines)


def _export(parsed: "Arguments[Options]", settings: Sequence[str]) -> "Exported":
    from trainer.export.exported_model import Choices  # imports torch, which --help does not need
    from trainer.export.exporting import export

    options = parsed.options
    choices = Choices(
        averaged=None if options.weights is None else options.weights == "ema",
        dtype=options.dtype,
        device=options.device,
        part=options.part,
        inputs=options.inputs,
        settings=settings,
        allowed=[name for name in options.allow.split(",") if name],
    )
    return export(
        parsed.places[0],
        options.format,
        options.step,
        options.out,
        choices=choices,
        options={key: text for key, text in parsed.texts.items() if text},
        atol=options.atol,
        rtol=options.rtol,
        store=parsed.store,
    )


def _is_setting(argument: str) -> bool:
    """Return true for an override of the run's configuration: a dotted key, not `store.…`."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and "." in key and "/" not in key and not key.startswith(("-", "store."))


if __name__ == "__main__":
    sys.exit(main())
