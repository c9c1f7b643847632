"""The saver and the mirror of an attempt, built from the configuration."""

from contextlib import suppress
from typing import Any

from trainer.checkpoint.lineage import Attempt
from trainer.checkpoint.mirror import Mirror
from trainer.checkpoint.replicas import Replicas
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.save_settings import SaveHooks, SavePolicy, SaveTarget
from trainer.checkpoint.saver import Saver
from trainer.config.schema import Checkpoint, Run
from trainer.core.intervals import Every
from trainer.storage import Store
from trainer.tracking import jsonl
from trainer.training.job import Job
from trainer.training.resume import Start

LOGS = (jsonl.FILE_NAME, jsonl.SAVES_NAME)
"""Files of the run that a resumed attempt continues."""


def build_mirror(
    run: Run, job: Job, replicas: Replicas, attempt: Attempt, start: Start
) -> Mirror | None:
    """Start the mirror's copies, first of the checkpoint that the attempt starts from. Collective.

    Returns None if the run has no mirror.
    """
    if replicas.mirror is None:
        return None
    settings = run.checkpoint
    retention = Retention(
        replicas.mirror,
        attempt,
        keep_last=settings.mirror_keep_last,
        keep_best=settings.mirror_keep_best,
        keep_every_steps=settings.mirror_keep_every_steps,
        metric=settings.metric,
        mode=job.metric_mode or "max",
    )
    mirror = Mirror(
        replicas.run,
        replicas.mirror,
        job.world,
        attempt,
        retention=retention,
        also=lambda: _other_files(replicas.run),
    )
    if start.manifest is not None and job.world.run_on_rank0(lambda: start.is_in_run(replicas)):
        mirror.submit(start.manifest)
    return mirror


def _other_files(store: Store) -> dict[str, bytes]:
    """Return the files, except checkpoints, that must outlive the run's store."""
    files = {name: jsonl.read_text(store, name) for name in LOGS}
    with suppress(FileNotFoundError):
        files["config.yaml"] = store.read("config.yaml")
    return files


def build_saver(
    run: Run,
    job: Job,
    target: SaveTarget,
    *,
    grace_s: float,
    mirror: Mirror | None,
) -> Saver:
    """Build the saver. Collective.

    Args:
        run: the configuration.
        job: the job; its tracker is called for each save.
        target: the run and the attempt.
        grace_s: seconds between a signal and SIGKILL.
        mirror: the mirror, if the run has one.
    """
    settings = run.checkpoint
    retention = Retention(
        target.store,
        target.attempt,
        keep_last=settings.keep_last,
        keep_best=settings.keep_best,
        keep_every_steps=settings.keep_every_steps,
        metric=settings.metric,
        mode=job.metric_mode or "max",
    )
    policy = SavePolicy(
        every=Every(steps=settings.every_steps, epochs=settings.every_epochs),
        milestones=tuple(steps for steps in _milestones(settings) if steps is not None),
        save_best=settings.metric is not None and _keeps_best(settings),
        every_s=settings.every_s,
        timeout_s=settings.timeout_s,
        grace_s=grace_s,
        stop_on_error=settings.on_error == "stop",
    )
    hooks = SaveHooks(
        before_commit=job.tracker.flush,
        log=job.tracker.message,
        saved=getattr(job.tracker, "saved", lambda save: None),  # optional,
    )
    return Saver(target, policy, retention, mirror, hooks)


def _milestones(settings: Checkpoint) -> list[int | None]:
    mirrored = settings.mirror_keep_every_steps if settings.mirror is not None else None
    return [settings.keep_every_steps, mirrored]


def _keeps_best(settings: Checkpoint) -> bool:
    return bool(settings.keep_best or (settings.mirror is not None and settings.mirror_keep_best))


def last_save_s(records: list[dict[str, Any]]) -> float | None:
    """Return the duration of the newest save in attempt records, oldest first; None: unknown."""
    times_s = [record["save_s"] for record in records if record.get("save_s")]
    return times_s[-1] if times_s else None
