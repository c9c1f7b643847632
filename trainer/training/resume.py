"""Selection and loading of the checkpoint that an attempt starts from."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from trainer import checkpoint
from trainer.checkpoint import DamagedError, lineage, select
from trainer.checkpoint.lineage import Attempt, Commit
from trainer.checkpoint.location import find_location
from trainer.checkpoint.manifest import Manifest, VersionError
from trainer.checkpoint.replicas import Replicas, Survey
from trainer.checkpoint.select import Selection
from trainer.checkpoint.shard_reader import MissingError
from trainer.config.schema import Init, ObjectStore, Run
from trainer.core.state import State
from trainer.errors import CheckpointError, ConfigError
from trainer.storage import local_path, open_store
from trainer.storage.store import Fallback
from trainer.training import contents, optimizers, schedules
from trainer.training.differences import Difference, check_overrides, compare, rejection_text
from trainer.training.job import Job
from trainer.training.takeover import EVERYTHING, Takeover, decide


@dataclass(frozen=True)
class Start:
    """The checkpoint that an attempt starts from, or none."""

    urls: tuple[str, ...] = ()
    """Stores to read it from, in this order."""
    commit: Commit | None = None
    manifest: Manifest | None = None
    """None: from scratch."""
    is_fork: bool = False
    """True if the checkpoint belongs to another run."""
    is_named: bool = False
    """True if it was requested by its step or as `best`, so that no other replaces it."""
    is_copied: bool = True
    """False if the run's mirror does not have it."""
    differences: tuple[Difference, ...] = ()
    takeover: Takeover = EVERYTHING
    """Parts of the state that come from the checkpoint."""
    skipped: tuple[str, ...] = ()
    """Errors of newer checkpoints, which are damaged."""
    notes: tuple[str, ...] = ()
    """Lines about the initial weights."""

    @property
    def step(self) -> int:
        """Step of the checkpoint; 0 from scratch."""
        return self.manifest.step if self.manifest else 0

    @property
    def epoch(self) -> int:
        """Complete epochs at that step."""
        return self.manifest.epoch if self.manifest else 0

    @property
    def state(self) -> State:
        """State stored in the checkpoint, see `contents.stored_state`; from scratch: at step 0."""
        return contents.stored_state(self.manifest) if self.manifest else State()

    def is_in_run(self, replicas: Replicas) -> bool:
        """Return whether the run's own store has the checkpoint."""
        if self.is_fork or self.commit is None or self.urls[0] != replicas.run.url:
            return False
        return self.commit.manifest_key in replicas.run.list(self.commit.folder)


def open_replicas(run: Run) -> Replicas:
    """Open the run's store, and its mirror if any."""
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
    """Select the checkpoint to start from. Rank 0 only; reads only.

    A step, `best` or `never` is honoured once: if the same command runs again, as after a
    preemption, the run continues from its newest checkpoint.

    Args:
        replicas: the run's stores.
        run: the configuration, with the request in `run.resume`.
        config: the configuration as stored in checkpoints.
        attempt: number of the present attempt; None before it begins.
        damaged: checkpoints that failed to load, with the stores they were read from.

    Raises:
        ConfigError: this configuration cannot continue the run, or `resume` matches nothing.
        CheckpointError: checkpoints exist, and all are damaged; or the run had some, and none is
            there.
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
                f"{commits[-1].step:,}. Start a new run with name=…, or delete that directory"
            )
        request = "auto"
    is_named = request.isdecimal() or request == "best"
    if is_named and not (honoured and commits):
        commit = _named(survey, request, run)
        start = replace(_newest(survey, run, damaged, [commit]), is_named=True)
    elif survey.with_damaged:
        start = _newest(survey, run, damaged)
    else:
        if run.resume != "never":
            _check_none_lost(earlier, run)
        if request == "auto":
            return Start()
        start = _fork(request, run.store)
    assert start.manifest is not None  # noqa: S101 (for the type checker)
    if contents.RUN not in start.manifest.objects:
        raise ConfigError(
            f"resume={run.resume}: that checkpoint was saved by another loop and has no run state; "
            f"start from its weights only: init.weights={run.resume}"
        )
    differences = compare(start.manifest.config, config)
    if unknown := check_overrides(run.resume_override, start.manifest.config, config):
        raise ConfigError("resume_override: " + "; ".join(unknown))
    rejected = [
        d for d in differences if d.prevents_resume and not d.is_overridden(run.resume_override)
    ]
    if not start.is_fork and rejected:
        raise ConfigError(rejection_text(run.run_dir, start.step, rejected))
    other_optimizer = next((d for d in differences if d.key == "optimizer._target_"), None)
    if other_optimizer is not None:
        raise ConfigError(
            f"resume={run.resume}: {other_optimizer}; the saved optimizer state does not fit. "
            "Start from the weights only: init.weights=<file>, exported by python -m trainer.export"
        )
    takeover = decide(
        start.manifest.config,
        config,
        differences,
        is_fork=start.is_fork,
        phases=contents.phase_names(start.manifest),
    )
    return replace(start, differences=differences, takeover=takeover)


def _check_none_lost(records: Sequence[Mapping[str, Any]], run: Run) -> None:
    """Raise if attempts since the last start from scratch had a checkpoint; none is there now."""
    for record in reversed(records):
        start = (record.get("resumed_from") or {}).get("step")
        step = record.get("committed_step") or start
        if step:
            raise CheckpointError(
                f"{run.run_dir} has no checkpoint, but its attempt {record['attempt']} had one at "
                f"step {step:,}. It was deleted or moved, or its disk is not mounted. Refusing to "
                "start from scratch: restore it, start over in the same directory with "
                "resume=never, or start a new run with name=…"
            )
        if start == 0:
            return


def _newest(
    survey: Survey,
    run: Run,
    damaged: Collection[tuple[Commit, tuple[str, ...]]],
    commits: Sequence[Commit] | None = None,
) -> Start:
    try:
        return _start(select.newest_intact(survey, run.run_dir, commits=commits, damaged=damaged))
    except VersionError:
        raise
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
        return select.named_step(survey, request, run.run_dir, "resume=")
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
    parent, at, step = request.rpartition("@")
    if selection is None and at and step.isdecimal():
        url = str(local_path(parent) or parent)
        location = find_location(url, settings)
        if location is not None:
            survey = location.survey()
            commit = select.named_step(survey, step, url, f"resume={parent}@")
            selection = select.newest_intact(survey, url, commits=[commit])
    if selection is None:
        raise ConfigError(
            f"resume={request}: no committed checkpoint there; use auto, never, best, a step, a "
            "run directory, RUN@STEP, or a checkpoint folder"
        )
    return replace(_start(selection), is_fork=True)


def finished(run: Run, start: Start) -> bool:
    """Return whether the checkpoint is the end of the run, evaluated and copied to the mirror."""
    if start.manifest is None or start.is_fork or not start.is_copied:
        return False
    limits = run.trainer
    by_steps = limits.max_steps is not None and start.manifest.step >= limits.max_steps
    by_epochs = limits.max_epochs is not None and start.manifest.epoch >= limits.max_epochs
    state = start.manifest.objects[contents.RUN]
    patience = limits.patience_evals
    by_patience = (
        patience is not None and start.takeover.best and state.get("stale_evals", 0) >= patience
    )
    return (by_steps or by_epochs or by_patience) and state["last_eval_step"] == start.step


def load(
    job: Job,
    start: Start,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
) -> State:
    """Restore the job from `start`; return the state of the run. No collectives.

    Call it on every rank, then let the ranks vote. Raises as `contents.restore`, and a ConfigError
    if a schedule ends before the run, or an optimizer cannot continue under changed settings.
    """
    state = State()
    if start.manifest is not None and start.commit is not None:
        stores = Fallback([open_store(url, settings) for url in start.urls])
        peers = job.world.local_size
        reader = checkpoint.Reader(stores, start.commit.folder, start.manifest, peers=peers)
        state = contents.restore(job, start, start.manifest, reader)
        changed = [d.key for d in start.differences if d.is_below("optimizer")]
        changed += ["scheduler"] if not start.takeover.schedule else []
        for phase in job.phases if changed else ():
            former = contents.former_groups(job, phase, start.manifest, reader)
            groups = phase.optimizer.param_groups
            optimizers.check_change(start.takeover.node(phase.name), former, groups, changed)
    schedules.check_length(job, state)
    return state


def final_value(run: Run) -> float | None:
    """Return the best value of `checkpoint.metric` so far, or the loss of the last evaluation.

    None without checkpoints or evaluations.
    """
    store = open_store(run.run_dir, run.store)
    commits = lineage.commits(store)
    if not commits:
        return None
    state = lineage.read_manifest(store, commits[-1]).objects[contents.RUN]
    if run.checkpoint.metric is None:
        return dict(state["metrics"]).get("loss")
    best = state["best"]
    return None if best is None else float(best["value"])


def load_intact(
    run: Run, stored: Mapping[str, Any], job: Job, replicas: Replicas, attempt: Attempt
) -> tuple[Start, State]:
    """Load the newest checkpoint that is intact on every rank; mark damaged ones. Collective.

    Selects after the attempt is recorded: from then on no earlier one commits or prunes.
    """
    world = job.world
    damaged: list[tuple[Commit, tuple[str, ...]]] = []
    while True:
        start = world.run_on_rank0(
            lambda: choose(replicas, run, stored, attempt=attempt.number, damaged=damaged)
        )
        try:
            state = world.run_on_all(partial(load, job, start, run.store))
        except DamagedError as error:
            is_last = len(start.urls) == 1
            if start.is_fork or start.commit is None or (start.is_named and is_last):
                world.run_on_rank0(partial(_raise_damaged, run, start, error))
            else:
                damaged.append((start.commit, start.urls))
                world.run_on_rank0(partial(_mark_damaged, replicas, start, start.commit, error))
            continue
        if start.manifest is None and run.init.weights:
            warn = job.tracker.message  # silent on other ranks
            fill = partial(load_weights, job.model, run.init, run.store, warn=warn)
            start = world.run_on_all(fill)
            if job.ema is not None:
                job.ema.restart()
        return start, state


def _mark_damaged(replicas: Replicas, start: Start, commit: Commit, error: DamagedError) -> None:
    """Mark the checkpoint in the store it was read from, unless other nodes may have the file."""
    store = next(store for store in replicas.stores if store.url == start.urls[0])
    may_be_elsewhere = isinstance(error, MissingError) and replicas.mirror is not None
    if not may_be_elsewhere and commit.manifest_key in store.list(commit.folder):
        lineage.mark_damaged(store, commit, str(error))
    kind = "incomplete" if may_be_elsewhere else "damaged"
    others = "its copy or " if len(start.urls) > 1 else ""
    print(f"warning: {kind} checkpoint: {error}. Trying {others}an older one.", flush=True)


def _raise_damaged(run: Run, start: Start, error: DamagedError) -> None:
    commits = lineage.commits(open_store(start.urls[0], run.store))
    older = [f"{commit.step:,}" for commit in reversed(commits) if commit.step < start.step]
    if not older:
        raise DamagedError(f"{error}. No older checkpoint exists")
    raise DamagedError(
        f"{error}. Older checkpoints: steps {', '.join(older)}. Resume from one with "
        f"resume={older[0]}"
    )


def load_weights(
    model: torch.nn.Module,
    init: Init,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
    *,
    warn: Callable[[str], None] = print,
) -> Start:
    """Load weights into the model, as `init` states. Any rank, no collectives.

    Returns:
        A start from scratch, with lines about the weights.

    Raises:
        ConfigError: no such weights, or they do not fit.
        CheckpointError: the weights are damaged or in an unsupported format.
    """
    from trainer.importing import weights  # slow to import: all other formats

    loaded = weights.load(model, init, settings, warn=warn)
    return Start(skipped=tuple(loaded.skipped), notes=tuple(loaded.lines))
