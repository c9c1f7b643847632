"""Where a run goes on from, and whether this configuration may go on from there. Reads only."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trainer import checkpoint
from trainer.checkpoint import select
from trainer.checkpoint.lineage import Commit
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.replicas import Replicas, Survey
from trainer.checkpoint.select import Selection
from trainer.config.schema import Init, ObjectStore, Run
from trainer.core.state import State
from trainer.errors import CheckpointError, ConfigError
from trainer.storage import local_path, open_store
from trainer.storage.store import Fallback
from trainer.training import contents
from trainer.training.differences import Difference, compare, optimizer_changes, rejection_text
from trainer.training.job import Job


@dataclass(frozen=True)
class Start:
    """Where an attempt starts from."""

    urls: tuple[str, ...] = ()
    """Where its bytes are looked for, in this order."""
    commit: Commit | None = None
    manifest: Manifest | None = None
    """None: from scratch."""
    is_fork: bool = False
    """The checkpoint belongs to another run."""
    is_named: bool = False
    """It was asked for by its step or as `best`, so no other one will do."""
    is_copied: bool = True
    """The mirror has it, if there is a mirror."""
    differences: tuple[Difference, ...] = ()
    skipped: tuple[str, ...] = ()
    """Newer checkpoints that were passed over, and why."""
    filled: tuple[str, ...] = ()
    """What there is to say of the weights that a run begins with."""

    def differs(self, *keys: str) -> bool:
        """Return whether a setting with one of these keys, or below one, differs."""
        return any(
            d.key == key or d.key.startswith(f"{key}.") for d in self.differences for key in keys
        )

    def changed_optimizer_settings(self, phase: str) -> dict[str, Any]:
        """Return new values of the optimizer settings that changed for a phase, by name."""
        config = self.manifest.config if self.manifest else {}
        return optimizer_changes(self.differences, config, phase)

    @property
    def step(self) -> int:
        """The step to go on from; 0 from scratch."""
        return self.manifest.step if self.manifest else 0

    @property
    def epoch(self) -> int:
        """Complete epochs at that step."""
        return self.manifest.epoch if self.manifest else 0


def open_replicas(run: Run) -> Replicas:
    """Open the run's store, and its mirror, if it has one."""
    mirror = run.checkpoint.mirror
    return Replicas(
        open_store(run.run_dir, run.store), open_store(mirror, run.store) if mirror else None
    )


def choose(
    replicas: Replicas,
    run: Run,
    config: Mapping[str, Any],
    *,
    attempt: int | None = None,
    damaged: Collection[tuple[Commit, tuple[str, ...]]] = (),
) -> Start:
    """Decide where to start. Rank 0 only.

    Args:
        replicas: the run's own stores.
        run: the configuration; `run.resume` says what is wanted.
        config: the configuration as it would be stored.
        attempt: the number of the attempt that asks, where it has one already.
        damaged: checkpoints that were found damaged while loading, and where they were read from.

    A step, `best` or `never` is honoured once: when the same command runs again, as it does after
    a preemption, the run goes on from its newest checkpoint.

    Raises:
        ConfigError: this configuration cannot go on with this run, or `resume` names nothing.
        CheckpointError: checkpoints exist and none of them is whole.
    """
    survey = replicas.survey()
    commits = survey.commits
    request = run.resume
    earlier = [r for r in survey.records if attempt is None or r["attempt"] < attempt]
    honoured = any(r.get("resume") == request and r.get("resumed_from") for r in earlier[-1:])
    if request == "never":
        if commits and not honoured:
            raise ConfigError(
                f"resume=never, but {run.run_dir} has checkpoints up to step "
                f"{commits[-1].step:,}. Choose another name=…, or delete that directory yourself"
            )
        request = "auto"
    wants_step = request.isdecimal() or request == "best"
    if wants_step and not (honoured and commits):
        commit = _named(survey, request, run)
        start = replace(_newest(survey, run, damaged, [commit]), is_named=True)
    elif survey.with_damaged:
        start = _newest(survey, run, damaged)
    elif request == "auto":
        return Start()
    else:
        start = _fork(request, run.store)
    assert start.manifest is not None  # noqa: S101 (for the type checker)
    if contents.RUN not in start.manifest.objects:
        raise ConfigError(
            f"resume={run.resume}: that checkpoint was not written by a run but by another loop; "
            f"begin from its weights alone: init.weights={run.resume}"
        )
    differences = compare(start.manifest.config, config)
    if not start.is_fork and any(d.prevents_resume for d in differences):
        raise ConfigError(rejection_text(run.run_dir, start.step, differences))
    other_optimizer = next((d for d in differences if d.key == "optimizer._target_"), None)
    if other_optimizer is not None:
        raise ConfigError(
            f"resume={run.resume}: {other_optimizer}; one optimizer cannot go on with the state of "
            "another. Begin from the weights alone: init.weights=<file>, exported with python -m "
            "trainer.export"
        )
    return replace(start, differences=differences)


def _newest(
    survey: Survey,
    run: Run,
    damaged: Collection[tuple[Commit, tuple[str, ...]]],
    commits: Sequence[Commit] | None = None,
) -> Start:
    try:
        return _start(select.newest_intact(survey, run.run_dir, commits=commits, damaged=damaged))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Refusing to start from scratch. Restore one of them, or start a new run with "
            "name=…"
        ) from None


def _start(selection: Selection) -> Start:
    return Start(
        selection.urls,
        selection.commit,
        selection.manifest,
        is_copied=selection.is_copied,
        skipped=selection.skipped,
    )


def _named(survey: Survey, request: str, run: Run) -> Commit:
    if request != "best":
        return select.named_step(survey, request, run.run_dir, "resume")
    best = select.best(survey, run.checkpoint.metric, run.checkpoint.mode)
    if best is None:
        raise ConfigError(
            f"resume=best, but no checkpoint in {run.run_dir} has a measured metric; set "
            "checkpoint.metric, or use resume=auto"
        )
    return best


def _fork(request: str, settings: ObjectStore) -> Start:
    """Return the start from a checkpoint of another run."""
    selection = select.from_path(str(local_path(request) or request), settings)
    if selection is None:
        raise ConfigError(
            f"resume={request}: no committed checkpoint there; use auto, never, best, a step, a "
            "run directory, or a checkpoint folder"
        )
    return replace(_start(selection), is_fork=True)


def finished(run: Run, start: Start) -> bool:
    """Return whether the checkpoint is the end that `run` asks for, evaluated and copied."""
    if start.manifest is None or start.is_fork or not start.is_copied:
        return False
    limits = run.trainer
    by_steps = limits.max_steps is not None and start.manifest.step >= limits.max_steps
    by_epochs = limits.max_epochs is not None and start.manifest.epoch >= limits.max_epochs
    state = start.manifest.objects[contents.RUN]
    patience = limits.patience_evals
    by_patience = patience is not None and state.get("stale_evals", 0) >= patience
    return (by_steps or by_epochs or by_patience) and state["last_eval_step"] == start.step


def load(
    job: Job,
    start: Start,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
) -> State:
    """Restore the job from `start`; return the state of the run. No collectives.

    Call it on every rank, then let the ranks vote. Raises as `contents.restore`.
    """
    if start.manifest is None or start.commit is None:
        return State()
    stores = Fallback([open_store(url, settings) for url in start.urls])
    peers = job.world.local_size
    reader = checkpoint.Reader(stores, start.commit.folder, start.manifest, peers=peers)
    return contents.restore(job, start, start.manifest, reader)


def load_weights(
    model: torch.nn.Module,
    wanted: Init,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
    *,
    warn: Callable[[str], None] = print,
) -> Start:
    """Fill the model with weights alone, as `init` says. Any rank, no collectives.

    Returns:
        A start from scratch, with what there is to say of the weights.

    Raises:
        ConfigError: there are none, or they do not fit.
        CheckpointError: they are damaged, or in a file that is not read.
    """
    from trainer.importing import weights  # with everything that knows other formats

    loaded = weights.load(model, wanted, settings, warn=warn)
    return Start(skipped=tuple(loaded.skipped), filled=tuple(loaded.lines))
