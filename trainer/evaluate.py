"""python -m trainer.evaluate RUN [step=…] [weights=…] [key=value …]: evaluate a checkpoint."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from trainer import cli
from trainer.config.compose import config_folders
from trainer.config.schema import ObjectStore, setting
from trainer.core.formatting import table
from trainer.errors import DONE, ConfigError, closest

_WEIGHTS = ("auto", "model", "ema")


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    step: str = setting("latest", "latest, best, or a step number")
    weights: str = setting(
        "auto",
        "model, ema (the moving averages), or auto: ema if the run has averages",
        choices=_WEIGHTS,
    )
    allow: str = setting(
        "",
        "packages or names, separated by commas, that the checkpoint's configuration may call in "
        "addition to this project's and torch.nn",
    )


_USAGE = f"""usage: python -m trainer.evaluate RUN [step=…] [weights=…] [allow=…] [key=value …]
  RUN      run directory, folder of checkpoints, or one checkpoint; local, s3://… etc.
{cli.options_text(Options, 7)}
  key      configuration override, such as data.dir=/elsewhere or trainer.eval_batch_size=256;
           data=NAME and task=NAME choose another group
  --config-dir  folder with additional groups, as in trainer.run
  --json   print one JSON object instead of text"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return cli.command(argv, _USAGE, _evaluate)


def _evaluate(argv: list[str]) -> int:
    argv, config_dirs = config_folders(argv, _USAGE)
    arguments, settings = _split(argv)
    parsed = cli.parse(arguments, _USAGE, Options, flags=("--json",))
    result = evaluate(
        parsed.places[0],
        step=parsed.options.step,
        weights=parsed.options.weights,
        settings=settings,
        config_dirs=config_dirs,
        allowed=[name for name in parsed.options.allow.split(",") if name],
        store=parsed.store,
    )
    print(result.json() if "--json" in parsed.flags else result.text())
    return DONE


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one checkpoint."""

    location: str
    step: int
    weights: str
    samples: int
    metrics: dict[str, float]

    def text(self) -> str:
        """Return a table of the metrics."""
        rows = [[name, f"{value:.6g}"] for name, value in self.metrics.items()]
        weights = "averaged weights" if self.weights == "ema" else "weights"
        head = f"{self.location} at step {self.step:,}, {weights}, {self.samples:,} samples"
        return f"{head}\n\n{table([['metric', 'value'], *rows])}"

    def json(self) -> str:
        """Return one JSON object."""
        return json.dumps(
            {
                "place": self.location, "step": self.step, "weights": self.weights,
                "samples": self.samples, "metrics": self.metrics,
            },
            indent=1,
        )  # fmt: skip


def evaluate(
    location: str,
    *,
    step: str = "latest",
    weights: str = "auto",
    settings: Sequence[str] = (),
    config_dirs: Sequence[Path] = (),
    allowed: Sequence[str] = (),
    store: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
) -> Evaluation:
    """Evaluate a checkpoint on the run's evaluation data, as the run does. One process.

    Args:
        location: a run directory, a folder of checkpoints, or one checkpoint's folder.
        step: `latest`, `best` or a step number.
        weights: `model`, `ema` or `auto`: `ema` if the checkpoint has averages.
        settings: `key=value` overrides of the checkpoint's configuration; `data=NAME` and
            `task=NAME` choose another group.
        config_dirs: folders with additional groups.
        allowed: packages or names it may call in addition to `allowed_targets.ALLOWED`.
        store: object store settings.

    Raises:
        ConfigError: no such checkpoint, its configuration is unusable, or no evaluation data.
        DataError: the data is unusable.
        DamagedError: a checksum differs.
    """
    if weights not in _WEIGHTS:
        raise ConfigError(f"weights={weights}: unknown choice{closest(weights, _WEIGHTS)}")
    import torch  # not above: --help does not need it

    from trainer.cluster.stop import Stop
    from trainer.cluster.world import World
    from trainer.core.state import State
    from trainer.export import rebuild
    from trainer.export.loaded_checkpoint import open_checkpoint
    from trainer.tracking.several import Silent
    from trainer.training import build, evaluation

    checkpoint = open_checkpoint(location, step, store)
    run = rebuild.configuration(checkpoint, settings, allowed, config_dirs)
    world = World(device=torch.device("cpu"))
    data = build.build_data(run)
    job = build.build_job(run, world, data, Silent())
    if job.evaluation is None:
        raise ConfigError(f"{location}: the data of this run has no evaluation split")
    if weights == "auto":
        weights = "ema" if checkpoint.has_averages else "model"
    rebuild.load_weights(job.model, checkpoint, averaged=weights == "ema")
    metrics = evaluation.evaluate(job, State(step=checkpoint.commit.step), Stop(world)) or {}
    count = len(job.evaluation.dataset)
    return Evaluation(location, checkpoint.commit.step, weights, count, metrics)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return this command's arguments, and the overrides of the run's configuration."""
    arguments: list[str] = []
    settings: list[str] = []
    names = {item.name for item in fields(Options)}
    for argument in argv:
        key, equals, _ = argument.partition("=")
        is_setting = equals and "/" not in key and not key.startswith(("-", "store."))
        (settings if is_setting and key not in names else arguments).append(argument)
    return arguments, settings


if __name__ == "__main__":
    sys.exit(main())
