"""Attempt of a run, on every rank: prepare, load, train, and close what was opened."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from omegaconf import OmegaConf

from trainer import reporting
from trainer.checkpoint import attempts, lineage
from trainer.checkpoint.lineage import Attempt
from trainer.checkpoint.replicas import Replicas
from trainer.checkpoint.save_settings import SaveTarget
from trainer.cluster import launch, outcome, shared_storage, slurm
from trainer.cluster.stop import DEADLINE, Stop, reason_text
from trainer.cluster.watchdog import Watchdog
from trainer.cluster.world import World
from trainer.config import own_runs, validate
from trainer.config.schema import Run
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.data import limits, workers
from trainer.errors import DONE, FAILURE, RUN_AGAIN, ConfigError, PerdureError
from trainer.monitoring.profiling import Profiler
from trainer.protocols import Tracker
from trainer.storage import Store, open_store
from trainer.training import (
    admission,
    build,
    loop,
    messages,
    metric_setup,
    oom,
    resume,
    sample_outputs,
    saving,
)  # fmt: skip
from trainer.training.attempt_record import AttemptRecord, progress_of, recorded, run_within
from trainer.training.boundary import interrupted_eval_step, repeats_evaluation
from trainer.training.job import Job
from trainer.training.late_start import ending_late_start
from trainer.training.rehearsal import check_start
from trainer.training.resume import Start
from trainer.training.step import warm_up

_FINAL_WRITE_S = 10.0
"""Maximum seconds for the last writes of a process that the watchdog ends."""
_EXIT_S = 15.0
"""Seconds to exit before the scheduler ends the job, in addition to the last saves."""
_REPORT_S = 120.0
"""Maximum seconds that a finished run waits for its report."""


def run_attempt(
    run: Run, stored: Mapping[str, Any], world: World, *, is_checked: bool = False
) -> int:
    """Start the run or continue it, once. Collective, main thread.

    Args:
        run: the configuration.
        stored: the configuration as stored in checkpoints, without secrets.
        world: the ranks.
        is_checked: whether the launcher has checked that the run is unfinished and can resume.

    Returns:
        The exit code that all ranks agree on: done, run again, or failure of the last save.

    Raises:
        ConfigError: the configuration cannot continue the run, or a tracker cannot be built.
    """
    admission.check_equal_configs(stored, world)
    replicas = resume.open_replicas(run)
    is_shared = shared_storage.is_shared(replicas.stores, world)
    if not is_checked:
        world.run_on_rank0(lambda: admission.check_stores(run, replicas))
        start = world.run_on_rank0(lambda: resume.choose(replicas, run, stored))
        if resume.finished(run, start):
            if world.rank == 0:
                print(messages.finished_text(run, start.state))
            return DONE
    earlier, facts = admission.admit(run, stored, replicas, world)
    threads = launch.threads_per_rank(run.launch, earlier[-1].get("threads") if earlier else None)
    torch.set_num_threads(threads)
    began = time.monotonic()
    metadata = {**_metadata(world, threads), **facts}
    grace_s = slurm.grace_s(run.preemption.grace_s)
    stop = Stop(world, grace_s=grace_s, deadline=_deadline(run, began))
    with ExitStack() as stack:  # closes in reverse order
        handlers = stack.enter_context(_signal_handlers(run, stop))
        tracker = world.run_on_all(lambda: build.build_tracker(run, world))
        after_all = stack.enter_context(ExitStack())
        record = stack.enter_context(recorded(replicas, metadata, world))
        stack.enter_context(_closing(tracker, record))
        watchdog = stack.enter_context(_watching(run, world, replicas, record.attempt, stop))
        stack.enter_context(ending_late_start(stop, _end_of_start(replicas, world, record)))
        stack.callback(handlers.close)  # a signal while closing ends the process
        stack.enter_context(_reporting_crashes(run, world, record, watchdog, after_all))
        source = world.run_on_all(lambda: build.build_data(run))
        job = build.build_job(run, world, source, tracker)
        world.run_on_all(lambda: metric_setup.set_up(run, job))
        stored = metric_setup.with_mode(stored, job)
        check_start(run, job)
        warm_up(job)
        start, state = resume.load_intact(run, stored, job, replicas, record.attempt)
        target = SaveTarget(
            store=replicas.run,
            world=world,
            attempt=record.attempt,
            config=stored,
            is_shared=is_shared,
            resumed_step=None if start.manifest is None or start.is_fork else start.step,
            last_save_s=saving.last_save_s(earlier),
        )
        mirror = saving.build_mirror(run, job, replicas, record.attempt, start)
        saver = saving.build_saver(run, job, target, grace_s=grace_s, mirror=mirror)
        job.skipped_eval_step = interrupted_eval_step(earlier)
        world.run_on_rank0(
            lambda: _record_start(run, stored, job, replicas, record.attempt, start, state)
        )
        saver.compare_with_grace()
        timing = loop.start_timing(job, state, saver, stop)
        record.start_heartbeat(progress_of(job, state, saver, stop, timing, began))
        trained = time.monotonic()
        position = state.step, state.last_eval_step
        profiler = _profiler(run, job, replicas.run, record.attempt)
        done = loop.train(job, state, saver, stop, timing=timing, profiler=profiler)
        if profiler is not None:
            profiler.close(state.step)
        seconds = time.monotonic() - trained
        in_vain = (state.step, state.last_eval_step) == position
        if stop.reason == DEADLINE and in_vain and not repeats_evaluation(job, state):
            world.run_on_rank0(lambda: _check_progress(run, trained - began, seconds))
        reason = messages.early_stop_reason(run, state) if done else reason_text(stop.reason)
        record.outcome = {"outcome": "done" if done else "preempted", "reason": reason}
        is_saved = saver.committed_step == state.step
        samples = sample_outputs.show(job, state.step, replicas.run) if done and is_saved else []
    if world.rank == 0:
        text = messages.end_text(run, state, saver, stop, timing, done, seconds)
        _print("\n".join([text, *samples]))
        _summarise(run, lineage.records(replicas.run), state.step, done)
    if not done:
        return RUN_AGAIN
    return DONE if is_saved else FAILURE


# --- contexts ----------------------------------------------------------------------------------


@contextmanager
def _signal_handlers(run: Run, stop: Stop) -> Iterator[ExitStack]:
    """Install the signal handlers; yield a stack that restores the previous ones, once."""
    with ExitStack() as handlers:
        stop.listen(run.preemption.signals, interrupts_end=not launch.is_rank())
        handlers.callback(stop.restore_handlers)
        yield handlers


@contextmanager
def _closing(tracker: Tracker, record: AttemptRecord) -> Iterator[None]:
    """Report the attempt's outcome to the tracker and close it."""
    try:
        yield
    finally:
        if ended := getattr(tracker, "ended", None):  # optional
            ended(record.outcome["outcome"])
        tracker.close()


@contextmanager
def _watching(
    run: Run, world: World, replicas: Replicas, attempt: Attempt, stop: Stop
) -> Iterator[Watchdog]:
    """Detect stalled and lost ranks in the background."""

    def write_stacks(text: str) -> None:  # the file system may be what hangs
        key = f"stacks/attempt-{attempt.number:04d}-rank-{world.rank}.txt"
        run_within(_FINAL_WRITE_S, "stacks", lambda: replicas.run.replace(key, text.encode()))

    def exit_process(text: str) -> None:
        if world.rank == 0:
            ending = {
                "ended": lineage.now(), "outcome": attempts.DIED, "error": text,
                "exit_code": RUN_AGAIN,
            }  # fmt: skip
            run_within(_FINAL_WRITE_S, "attempt-end", lambda: replicas.amend(attempt, ending))
        outcome.exit_to_resume(text)

    watchdog = Watchdog(
        world,
        boundaries=lambda: stop.boundaries,
        watchdog_s=run.launch.watchdog_s,
        peer_timeout_s=run.launch.peer_timeout_s,
        write_stacks=write_stacks,
        exit_process=exit_process,
        session=attempt.token,
    )
    try:
        yield watchdog
    finally:
        watchdog.stop()


def _end_of_start(replicas: Replicas, world: World, record: AttemptRecord) -> Callable[[], None]:
    """Return a function that ends the process before its first step, as preempted."""

    def end() -> None:
        if world.rank == 0:
            ending = {"ended": lineage.now(), "outcome": "preempted", "reason": "signal in start"}
            run_within(
                _FINAL_WRITE_S, "attempt-end", lambda: replicas.amend(record.attempt, ending)
            )
        outcome.exit_to_resume("stopped by a signal, and the start takes too long to save first")

    return end


@contextmanager
def _reporting_crashes(
    run: Run, world: World, record: AttemptRecord, watchdog: Watchdog, after_all: ExitStack
) -> Iterator[None]:
    """Explain errors, record them, and report a failure of this rank alone to its peers.

    Raises:
        SystemExit: this rank failed alone.
    """
    try:
        yield
    except BaseException as raised:
        peer = watchdog.explain(raised) or workers.lost_worker(raised)
        error = peer or oom.explain(raised, run, world) or limits.explain(raised) or raised
        text = record.fail(error)
        if peer is None and launch.is_rank() and not getattr(error, "agreed", False):
            code = outcome.report_crash(error)
            watchdog.report_failure(text)
            after_all.callback(watchdog.report_closed)
            raise SystemExit(code) from None
        if error is not raised:
            raise error from None
        raise


# --- checks ------------------------------------------------------------------------------------


def _check_progress(run: Run, starting_s: float, seconds: float) -> None:
    """Raise if `max_time` ends every attempt before its first step. Rank 0 only."""
    limit_s = validate.seconds(run.trainer.max_time or "")
    if limit_s is not None and starting_s + seconds >= limit_s:
        raise ConfigError(
            f"trainer.max_time={run.trainer.max_time} ended before the first step or evaluation: "
            f"starting took {starting_s:.1f} s. Increase trainer.max_time"
        )


def _deadline(run: Run, began: float) -> Callable[[float], bool]:
    """Return a function of the seconds to reserve: True once the attempt must end.

    It ends at `max_time`, or shortly before the scheduler ends the job.
    """
    limit_s = validate.seconds(run.trainer.max_time or "")
    end_s = slurm.end_time_s()

    def is_over(reserve_s: float) -> bool:
        if limit_s is not None and time.monotonic() - began >= limit_s:
            return True
        return end_s is not None and time.time() >= end_s - _EXIT_S - reserve_s

    return is_over


# --- start -------------------------------------------------------------------------------------


def _metadata(world: World, threads: int) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "world_size": world.size,
        "threads": threads,
        "device": world.device.type,
        **slurm.job_metadata(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }


def _profiler(run: Run, job: Job, store: Store, attempt: Attempt) -> Profiler | None:
    if not run.profile or job.world.rank != 0:
        return None
    return Profiler(
        f"attempt-{attempt.number:04d}",
        store.replace,
        first=run.trainer.profile_first_step,
        count=run.trainer.profile_steps,
        on_gpu=job.world.device.type == "cuda",
        log=job.tracker.message,
    )


def _record_start(
    run: Run,
    stored: Mapping[str, Any],
    job: Job,
    replicas: Replicas,
    attempt: Attempt,
    start: Start,
    state: State,
) -> None:
    """Record what the attempt starts from, before its first save, and start the tracker.

    Rank 0 only.
    """
    store = replicas.run
    is_in_run = start.is_in_run(replicas)
    if replicas.mirror is not None and start.manifest is not None and not is_in_run:
        for name in saving.LOGS:  # continued by this attempt
            with suppress(FileNotFoundError):
                store.replace(name, replicas.mirror.read(name))
    commit = None if start.is_fork else start.commit
    length = {"max_steps": job.max_steps, "steps_per_epoch": job.data.steps_per_epoch}
    values = {
        "resumed_from": {
            "step": commit.step if commit else 0,
            "attempt": commit.attempt if commit else None,
        },
        "first_step": state.step,
        **length,
        "changed": [str(difference) for difference in start.differences],
        **({"resume_override": run.resume_override} if run.resume_override else {}),
    }
    replicas.amend(attempt, values)
    store.replace("config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(stored))).encode())
    own_runs.record((s.url for s in replicas.stores), stored, run.store)
    intervals = run.checkpoint
    job.tracker.start(
        {
            "run_dir": run.run_dir,
            "store": store,
            "attempt": attempt.number,
            "step": state.step,
            "last_eval_step": state.last_eval_step,
            **length,
            "world_size": job.world.size,
            "config": stored,
            "peak_flops_per_s": job.peak_flops_per_s,
            "run_id": attempts.run_id(replicas.records()),
            "eval_every": job.eval_every if job.evaluation is not None else None,
            "save_every": Every(steps=intervals.every_steps, epochs=intervals.every_epochs),
            "save_every_s": intervals.every_s,
        }
    )
    record = lineage.records(store)[-1]
    earlier = record
    if start.manifest is not None:
        records = lineage.records(open_store(start.urls[0], run.store) if start.is_fork else store)
        saved_by = start.manifest.attempt
        earlier = next((r for r in records if r["attempt"] == saved_by), record)
    mirror = None if start.is_fork or is_in_run else run.checkpoint.mirror
    lines = messages.resume_lines(job, start, state, record, earlier, mirror=mirror)
    for line in [*messages.banner(run, job, record), *job.notes, *lines]:
        job.tracker.message(line)


# --- end ---------------------------------------------------------------------------------------


def _print(text: str) -> None:
    """Print; an error does not matter any more, since the run is saved."""
    with suppress(OSError, ValueError):  # a closed pipe, a full disk below the log
        print(text, flush=True)


def _summarise(run: Run, records: Sequence[attempts.Record], step: int, done: bool) -> None:
    """Print totals of all attempts; write the report of a finished run. Rank 0 only."""
    if len(records) > 1:
        _print(str(attempts.goodput(records, step)))
    if run.report and done:
        _report(run)


def _report(run: Run) -> None:
    """Write the run's report; errors are printed. Rank 0 only."""
    limit = f"not written within {_REPORT_S:.0f} s; write it with python -m trainer.report"
    lines = [f"warning: no report: {limit}"]

    def write() -> None:
        try:
            lines[:] = [messages.row("report", reporting.write([run.run_dir], settings=run.store))]
        except Exception as error:  # the run itself is finished
            lines[:] = [f"warning: no report: {type(error).__name__}: {error}"]
            if not isinstance(error, PerdureError):
                lines.append(traceback.format_exc().rstrip())

    run_within(_REPORT_S, "report", write)
    _print("\n".join(lines))
