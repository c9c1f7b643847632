"""Direction of `checkpoint.metric`, applied to the job and its stored configuration."""

from collections.abc import Mapping
from typing import Any

from trainer.config.schema import Run
from trainer.errors import ConfigError, problems_text
from trainer.training import schedules
from trainer.training.evaluation import create_metrics
from trainer.training.job import Job


def set_up(run: Run, job: Job) -> None:
    """Create the metrics; let plateau schedules without a mode follow the metric's.

    Call it before any state is loaded.

    Raises:
        ConfigError: a metric cannot be merged over ranks, `checkpoint.metric` does not exist, or a
            mode contradicts it.
    """
    if job.evaluation is None:
        return
    create_metrics(job)
    if problems := schedules.check_plateau(run, job.metric_mode):
        raise ConfigError(problems_text(problems))
    job.follow_metric()


def with_mode(stored: Mapping[str, Any], job: Job) -> Mapping[str, Any]:
    """Return the stored configuration with the mode of `checkpoint.metric`, by name or class."""
    if job.metric is None:
        return stored
    return {**stored, "checkpoint": {**stored["checkpoint"], "mode": job.metric_mode}}
