"""python -m trainer.evaluate RUN [step=…] [weights=…] [key=value …]: measure a checkpoint again."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainer import cli
from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.config.schema import ObjectStore
from trainer.core.formatting import table
from trainer.core.state import State
from trainer.errors import DONE, ConfigError, closest
from trainer.export import rebuild
from trainer.export.source import open_source
from trainer.tracking.several import Silent
from trainer.training import build, evaluation
from trainer.training.contents import EMA

_WEIGHTS = ("auto", "model", "ema")
_OPTIONS = {"step": "latest", "weights": "auto", "allow": ""}
_USAGE = """usage: python -m trainer.evaluate RUN [step=…] [weights=…] [allow=…] [key=value …]
  RUN      directory of a run, a folder of checkpoints, or one of them; local, s3://… and the like
  step     latest, best, or the number of a step that the run has kept (default latest)
  weights  model, ema: their moving average, or auto: the average where there is one (default auto)
  allow    packages or names, with commas between, that the checkpoint's configuration may call
           besides this project's own and torch.nn
  key      a setting to change, such as data.dir=/elsewhere or trainer.eval_batch_size=256
  --json   one JSON object on standard output instead of text"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return cli.command(argv, _USAGE, _evaluate)


def _evaluate(argv: list[str]) -> int:
    mine, settings = _sorted(argv)
    given = cli.parse(mine, _USAGE, options=_OPTIONS, flags=("--json",))
    allowed = [name for name in given.options["allow"].split(",") if name]
    found = evaluate(
        given.places[0],
        step=given.options["step"],
        weights=given.options["weights"],
        settings=settings,
        allowed=allowed,
        store=given.store,
    )
    print(found.json() if "--json" in given.flags else found.text())
    return DONE


@dataclass(frozen=True)
class Evaluation:
    """What was measured, of what."""

    place: str
    step: int
    weights: str
    samples: int
    figures: dict[str, float]

    def text(self) -> str:
        """Return what a person reads."""
        rows = [[name, f"{value:.6g}"] for name, value in self.figures.items()]
        of = "averaged weights" if self.weights == "ema" else "weights"
        head = f"{self.place} at step {self.step:,}, {of}, {self.samples:,} samples"
        return f"{head}\n\n{table([['metric', 'value'], *rows])}"

    def json(self) -> str:
        """Return one JSON object."""
        return json.dumps(
            {
                "place": self.place, "step": self.step, "weights": self.weights,
                "samples": self.samples, "metrics": self.figures,
            },
            indent=1,
        )  # fmt: skip


def evaluate(
    place: str,
    *,
    step: str = "latest",
    weights: str = "auto",
    settings: Sequence[str] = (),
    allowed: Sequence[str] = (),
    store: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
) -> Evaluation:
    """Measure a checkpoint on its evaluation data, as the run itself does. One process.

    Args:
        place: a run's directory, a folder of checkpoints, or the folder of one.
        step: `latest`, `best` or the number of one.
        weights: `model`, `ema` or `auto`, which is `ema` where there are averages.
        settings: `key=value` to change in the checkpoint's configuration.
        allowed: packages or names that this configuration may call besides `trust.ALLOWED`.
        store: how object stores are reached.

    Raises:
        ConfigError: there is no such checkpoint, or its configuration cannot be used.
        DataError: the data cannot be used, or nothing of it is to evaluate on.
        DamagedError: the checkpoint's bytes are wrong.
    """
    if weights not in _WEIGHTS:
        raise ConfigError(f"weights={weights}: there is no such choice{closest(weights, _WEIGHTS)}")
    source = open_source(place, step, store)
    run = rebuild.configuration(source, settings, allowed)
    world = World(device=torch.device("cpu"))
    data = build.build_data(run)
    job = build.build_job(run, world, data, Silent())
    if job.evaluation is None:
        raise ConfigError(f"{place}: its data has nothing to evaluate on")
    has_averages = any(name.startswith(EMA) for name in source.manifest.tensors)
    chosen = weights if weights != "auto" else "ema" if has_averages else "model"
    rebuild.fill(job.model, source, averaged=chosen == "ema")
    figures = evaluation.evaluate(job, State(step=source.commit.step), Stop(world)) or {}
    count = len(job.evaluation.dataset)
    return Evaluation(place, source.commit.step, chosen, count, figures)


def _sorted(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return this command's own arguments, and the settings of the run."""
    mine: list[str] = []
    settings: list[str] = []
    for argument in argv:
        key, equals, _ = argument.partition("=")
        is_setting = equals and "/" not in key and not key.startswith(("-", "store."))
        (settings if is_setting and key not in _OPTIONS else mine).append(argument)
    return mine, settings


if __name__ == "__main__":
    sys.exit(main())
