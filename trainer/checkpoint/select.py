"""Select the checkpoint that a path and a request (`latest`, `best` or a step) refer to."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import Commit
from trainer.checkpoint.location import Location, find_location
from trainer.checkpoint.manifest import Manifest, VersionError
from trainer.checkpoint.replicas import Survey
from trainer.config.schema import ObjectStore
from trainer.core import intervals, metric_mode
from trainer.errors import CheckpointError, ConfigError
from trainer.storage import Store
from trainer.storage.store import Fallback

if TYPE_CHECKING:
    from trainer.checkpoint.reader import Reader


@dataclass(frozen=True)
class Selection:
    """A committed checkpoint with a valid manifest, and the stores to read it from."""

    stores: tuple[Store, ...]
    """Stores in the order in which each key is tried."""
    commit: Commit
    manifest: Manifest
    skipped: tuple[str, ...] = ()
    """Errors of newer checkpoints that are damaged."""
    is_copied: bool = True
    """False if the run has a mirror that is missing the checkpoint."""

    @property
    def urls(self) -> tuple[str, ...]:
        """URLs of the stores."""
        return tuple(store.url for store in self.stores)

    def reader(self) -> "Reader":
        """Return a reader of the checkpoint's tensors."""
        from trainer.checkpoint.reader import Reader  # imports torch

        return Reader(Fallback(self.stores), self.commit.folder, self.manifest)


def newest_intact(
    survey: Survey,
    url: str,
    *,
    commits: Sequence[Commit] | None = None,
    damaged: Collection[tuple[Commit, tuple[str, ...]]] = (),
) -> Selection:
    """Return the newest checkpoint whose manifest is valid in one of the stores.

    Args:
        survey: the checkpoints.
        url: their location, for the error.
        commits: candidates, oldest first; default: all committed and not marked as damaged.
        damaged: candidates to skip, each with the URLs of the stores it was read from.

    Raises:
        VersionError: the newest is of a version of the format that this program does not read.
        CheckpointError: every candidate is damaged.
    """
    skipped: list[str] = []
    for commit in reversed(survey.commits if commits is None else commits):
        for stores in survey.views(commit):
            if (commit, tuple(store.url for store in stores)) in damaged:
                continue
            try:
                manifest = lineage.read_manifest(Fallback(stores), commit)
            except VersionError:  # not damaged: an older checkpoint must not replace it
                raise
            except CheckpointError as error:
                skipped.append(str(error))
                continue
            copied = survey.is_copied(commit)
            return Selection(tuple(stores), commit, manifest, tuple(skipped), copied)
    raise CheckpointError(" ".join([f"every checkpoint in {url} is damaged.", *skipped]))


def at_step(survey: Survey, step: int) -> Commit | None:
    """Return the checkpoint of a step, or None."""
    return next((commit for commit in reversed(survey.commits) if commit.step == step), None)


def named_step(survey: Survey, step: str, url: str, option: str) -> Commit:
    """Return the checkpoint of a step given as text.

    Args:
        survey: the checkpoints.
        step: the step, as typed.
        url: location of the checkpoints, for the error.
        option: what was typed before the step, such as `step=`, for the error.

    Raises:
        ConfigError: no checkpoint has that step; lists the steps.
    """
    digits = step.lstrip("0") or step[-1:]
    commits = [commit for commit in survey.commits if str(commit.step) == digits]
    if not commits:
        steps = ", ".join(f"{commit.step}" for commit in survey.commits) or "none"
        raise ConfigError(
            f"{option}{step}: no checkpoint of that step in {url}; steps available: {steps}"
        )
    return commits[-1]


def best(survey: Survey, metric: str | None, mode: str | None) -> Commit | None:
    """Return the checkpoint with the best metric, measured at its own step.

    Args:
        survey: the checkpoints.
        metric: metric name; None selects nothing.
        mode: `max` or `min`; None: from the name, else as the run stored it. Of equal values, the
            earliest wins.

    Raises:
        CheckpointError: one of the manifests is damaged in every store.
    """
    if metric is None or not survey.commits:
        return None
    if mode is None:
        settings = lineage.retention_of(_manifest(survey, survey.commits[-1]))
        stored = settings.get("mode") if settings.get("metric") == metric else None
        mode = metric_mode.resolve(metric, stored)
    by_step = {commit.step: commit for commit in survey.commits}
    values = {
        step: lineage.measured(_manifest(survey, commit), metric)
        for step, commit in by_step.items()
    }
    ranked = intervals.best_first(values, mode)
    return by_step[ranked[0]] if ranked else None


def pick(location: Location, request: str) -> Commit:
    """Return the newest (`latest`), best (`best`) or a given step's checkpoint of a location.

    Raises:
        ConfigError: no checkpoint matches.
        CheckpointError: a manifest that has to be read is damaged.
    """
    survey = location.survey()
    if not survey.commits:
        raise ConfigError(
            f"{location.url} has no committed checkpoint; pass the run directory that "
            "`python -m trainer.run` printed"
        )
    if request == "latest":
        return survey.commits[-1]
    if request != "best":
        return named_step(survey, request, location.url, "step=")
    settings = lineage.retention_of(_manifest(survey, survey.commits[-1]))
    metric = settings.get("metric")
    if metric is None:
        raise ConfigError(
            f"step=best: {location.url} tracks no metric (checkpoint.metric is not set)"
        )
    commit = best(survey, metric, None)
    if commit is None:
        raise CheckpointError(
            f"step=best: no checkpoint in {location.url} has {metric!r} measured at its own step; "
            "save as often as you evaluate (checkpoint.every_epochs, checkpoint.every_steps)"
        )
    return commit


def from_path(
    url: str,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
) -> Selection | None:
    """Return the newest intact checkpoint at a path, or None if the path has no checkpoint.

    Args:
        url: a run directory, a folder of checkpoints, one checkpoint folder or its manifest.
        settings: object store settings.

    Raises:
        CheckpointError: checkpoints exist, and all are damaged.
    """
    location = find_location(url, settings)
    survey = location.in_run(settings).survey() if location is not None else None
    if location is None or survey is None or not survey.with_damaged:
        return None
    return newest_intact(survey, location.url)


def newest_listed(store: Store, record: Mapping[str, Any]) -> Commit | None:
    """Return the newest committed checkpoint; cheap: reads no other attempt record, no manifest.

    Args:
        store: the run's store.
        record: record of the newest attempt, or an empty mapping.
    """
    candidates = lineage.candidates(store, records=[record] if record else [])
    return next((c for c in reversed(candidates) if not lineage.is_void_in(store, c)), None)


def _manifest(survey: Survey, commit: Commit) -> Manifest:
    """Read a manifest from the first view in which it is valid."""
    *views, last = survey.views(commit)
    for stores in views:
        with suppress(CheckpointError):
            return lineage.read_manifest(Fallback(stores), commit)
    return lineage.read_manifest(Fallback(last), commit)
