"""python -m trainer.checkpoints list|show|verify|diff|prune|copy PATH [key=value…] [--json].

`prune` and `copy` ask before they delete. The other verbs only read.
"""

import io
import json
import sys
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from trainer import cli
from trainer.checkpoints.answer import AllSteps, Answer, OneStep
from trainer.checkpoints.listing import list_checkpoints
from trainer.checkpoints.prune import Retention, prune
from trainer.checkpoints.show import show
from trainer.cli import Arguments, NoOptions
from trainer.errors import ConfigError, closest

_USAGE = """usage: python -m trainer.checkpoints VERB PATH [key=value…] [--json]
  list PATH                     step, attempt, size, age, ranks, state and metrics
  show PATH [step=…]            contents of one checkpoint
  verify PATH [step=…]          read every byte and name the first damaged tensor (default: all)
  diff PATH OTHER [step=…]      differences between two checkpoints; with one PATH and step=A,B,
                                between two of its steps
  prune PATH [keep_last=…] [keep_best=…] [keep_every_steps=…]
                                delete checkpoints outside of the retention policy, and orphaned
                                files (default: the policy in the run's configuration)
  copy PATH TARGET [step=…]     copy, verified, to another directory or bucket (default: all);
                                converts DCP folders, torch.save and safetensors files
  PATH    run directory, folder of checkpoints, or one checkpoint; local, s3://… or another URL
  step    latest, best, all, or a number (default: latest, unless noted)
  --json  one JSON object on standard output instead of text
  --yes   delete without asking
  store.endpoint_url=… and the other store.* settings of trainer.run
exit codes: 0 done (diff: equal), 1 damage, or a difference, 2 invalid arguments, nothing done"""

_OPTIONS: dict[str, type] = {
    "list": NoOptions, "show": OneStep, "verify": AllSteps, "diff": OneStep, "prune": Retention,
    "copy": AllSteps,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    interrupted = "interrupted; checkpoints copied or deleted before stay copied or deleted"
    return cli.command(argv, _USAGE, _run, interrupted=interrupted)


def _run(argv: list[str]) -> int:
    verb, rest = argv[0], argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if verb not in _OPTIONS:
        raise ConfigError(f"unknown verb {verb!r}{closest(verb, _OPTIONS)}\n{_USAGE}")
    flags = ["--json", "--yes"] if verb in ("prune", "copy") else ["--json"]
    places = {"diff": (1, 2), "copy": (2,)}.get(verb, (1,))
    arguments: Arguments[Any] = cli.parse(rest, _USAGE, _OPTIONS[verb], flags=flags, places=places)
    code, content, text = _answer(verb, arguments)
    if "--json" in arguments.flags:
        text = json.dumps(_strict(content), indent=1, ensure_ascii=False)
    print(text, flush=True)
    return code


def _answer(verb: str, arguments: Arguments[Any]) -> Answer:
    """Run a verb. Those that read tensors import torch, which takes longer than to list a run."""
    match verb:
        case "list":
            return list_checkpoints(arguments)
        case "show":
            return show(arguments)
        case "prune":
            return prune(arguments)
        case "verify":
            from trainer.checkpoints.verify import verify

            return verify(arguments)
        case "diff":
            from trainer.checkpoints.diff import diff

            return diff(arguments, _USAGE)
        case _:
            from trainer.checkpoints.copy import copy

            return copy(arguments)


def _strict(value: Any) -> Any:
    """Return a value as strict JSON; values that JSON does not have become their repr."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    is_plain = value is None or type(value) in (bool, int, str)
    return value if is_plain or (type(value) is float and isfinite(value)) else repr(value)
