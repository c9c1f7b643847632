"""One attempt of a run, on every rank: begin, build, load, train, end."""

import hashlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from omegaconf import OmegaConf

from trainer import reporting
from trainer.checkpoint import DamagedError, attempts, lineage
from trainer.checkpoint.lineage import Attempt, Commit
from trainer.checkpoint.reader import MissingError
from trainer.checkpoint.replicas import Mirror, Replicas
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.saver import SaveHooks, SavePolicy, Saver, SaveTarget
from trainer.cluster import launch, outcome, shared_storage, slurm
from trainer.cluster import watchdog as watchdog_
from trainer.cluster.stop import DEADLINE, Stop, reason_text
from trainer.cluster.world import World
from trainer.config import validate
from trainer.config.schema import Run
from trainer.core.formatting import pluralize
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.data.source import lost_worker
from trainer.errors import DONE, FAILURE, RUN_AGAIN, ConfigError, PerdureError, StoreError
from trainer.monitoring.profiling import Profiler
from trainer.monitoring.timing import Timing
from trainer.protocols import Tracker
from trainer.storage import Store, open_store
from trainer.tracking import jsonl
from trainer.training import build, loop, messages, oom, resume, sample_outputs
from trainer.training.job import Job
from trainer.training.resume import Start
from trainer.training.step import warm_up

_STACKS_S = 10.0
"""How long a store may take for the last words of a process that leaves."""
_LAST_WORDS_S = 5.0
"""How long the mirror may take to note how an attempt ended."""
_END_SPARE_S = 15.0
"""What leaving takes besides two saves, before a scheduler ends the job."""
_REPORT_S = 120.0
"""How long a finished run waits for its report."""
_LINES = (jsonl.FILE_NAME, jsonl.SAVES_NAME)
"""What trackers keep that goes on with the timeline."""


def run_attempt(run: Run, stored: Mapping[str, Any], world: World) -> int:
    """Start the run or go on with it, once. Collective, main thread.

    Args:
        run: the configuration.
        stored: the configuration as it is stored, without secrets.
        world: the ranks.

    Returns:
        The exit code of an outcome that all ranks agree on: done, or run again.
    """
    _refuse_different_configs(stored, world)
    replicas = resume.open_replicas(run)
    store = replicas.run
    is_shared = shared_storage.find_shared(replicas.stores, world)
    start = world.run_on_rank0(lambda: resume.choose(replicas, run, stored))
    if resume.finished(run, start):
        if world.rank == 0:
            print(messages.finished_text(run, start.step, start.epoch))
        return DONE
    earlier = world.run_on_rank0(lambda: _earlier(run, replicas))
    threads = launch.threads_per_rank(run.launch, earlier[-1].get("threads") if earlier else None)
    torch.set_num_threads(threads)
    began = time.monotonic()
    facts = {**_facts(world, threads), "resume": run.resume}
    attempt = world.run_on_rank0(lambda: replicas.begin(facts))
    grace_s = slurm.grace_s(run.preemption.grace_s)
    stop = Stop(world, grace_s=grace_s, deadline=_deadline(run, began))
    stop.listen(run.preemption.signals, interrupts_end=not launch.is_rank())
    watchdog = _watchdog(run, world, replicas, attempt, stop)
    ending: dict[str, Any] = {"outcome": attempts.DIED}
    tracker = world.run_on_all(lambda: build.build_tracker(run, world))
    notes = _Notes(replicas, attempt) if world.rank == 0 else None
    with ExitStack() as at_last:
        try:
            source = world.run_on_all(lambda: build.build_data(run))
            job = build.build_job(run, world, source, tracker)
            warm_up(job)
            start, state = _load(run, stored, job, replicas, attempt)
            mirror = _mirror(run, job, replicas, attempt, start)
            save_times_s = [record["save_s"] for record in earlier if record.get("save_s")]
            target = SaveTarget(
                store=store,
                world=world,
                attempt=attempt,
                config=stored,
                is_shared=is_shared,
                resumed_step=start.step
                if start.manifest is not None and not start.is_fork
                else None,
                last_save_s=save_times_s[-1] if save_times_s else None,
            )
            saver = _saver(run, job, target, stop.grace_s, mirror)
            world.run_on_rank0(
                lambda: _record_start(run, stored, job, replicas, attempt, start, state)
            )
            saver.compare_with_grace()
            profiler = _profiler(run, job, store, attempt)
            timing = loop.start_timing(job, state, saver, stop)
            if notes is not None:
                notes.keep(state, saver, stop, timing, began)
            trained = time.monotonic()
            before = state.step, state.last_eval_step
            done = loop.train(job, state, saver, stop, timing=timing, profiler=profiler)
            seconds = time.monotonic() - trained
            if stop.reason == DEADLINE and (state.step, state.last_eval_step) == before:
                world.run_on_rank0(lambda: _refuse_no_time(run, trained - began, seconds))
            ending = {"outcome": "done" if done else "preempted"}
            is_safe = done and saver.committed_step == state.step
            shown = sample_outputs.show(job, state.step, store) if is_safe else []
            if not done:
                ending["reason"] = reason_text(stop.reason)
        except BaseException as raised:
            peer = watchdog.explain(raised) or lost_worker(raised)
            error = peer or oom.explain(raised, run, world) or raised
            ending["error"] = why = f"{type(error).__name__}: {error}"[:2000]
            if peer is None and launch.is_rank() and not getattr(error, "agreed", False):
                code = outcome.report_crash(error)
                watchdog.failed(why)
                at_last.callback(watchdog.gone)
                raise SystemExit(code) from None
            if error is not raised:
                raise error from None
            raise
        finally:
            stop.restore_handlers()
            watchdog.stop()
            _close(tracker, ending["outcome"])
            if notes is not None:
                _record_end(replicas, attempt, {"ended": lineage.now(), **notes.end(), **ending})
    if world.rank == 0:
        text = messages.end_text(run, state, saver, stop, timing, done, seconds)
        _tell("\n".join([text, *shown]))
        _look_back(run, lineage.records(store), state.step, done)
    if not done:
        return RUN_AGAIN
    return DONE if saver.committed_step == state.step else FAILURE


def _tell(text: str) -> None:
    """Print, though nobody may hear it any more: the run is over and safe."""
    with suppress(OSError, ValueError):  # a closed pipe, a full disk below the log
        print(text, flush=True)


def _look_back(run: Run, records: Sequence[attempts.Record], step: int, done: bool) -> None:
    """Say what all attempts did together; at the run's end, make its page. Rank 0 only."""
    if len(records) > 1:
        _tell(str(attempts.goodput(records, step)))
    if run.report and done:
        _report(run)


def _report(run: Run) -> None:
    """Write the run's page; whatever becomes of it, the run is as it is. Rank 0 only."""
    said = [f"NO REPORT: not written within {_REPORT_S:.0f} s; python -m trainer.report writes it"]

    def write() -> None:
        try:
            said[:] = [f"  report    {reporting.write([run.run_dir], settings=run.store)}"]
        except PerdureError as error:
            said[:] = [f"NO REPORT: {type(error).__name__}: {error}"]
        except Exception as error:  # a bug in what only looks at a run must not end it either
            why = f"NO REPORT: {type(error).__name__}: {error}"
            said[:] = [f"{why}\n{traceback.format_exc().rstrip()}"]

    writing = threading.Thread(target=write, name="report", daemon=True)
    writing.start()
    writing.join(_REPORT_S)
    _tell(said[0])


def _close(tracker: Tracker, outcome: str) -> None:
    if act := getattr(tracker, "ended", None):
        act(outcome)
    tracker.close()


def _record_end(replicas: Replicas, attempt: Attempt, facts: Mapping[str, Any]) -> None:
    lineage.amend(replicas.run, attempt, facts)
    if replicas.mirror is None:
        return
    mirror = replicas.mirror

    def tell() -> None:
        try:
            lineage.amend(mirror, attempt, facts)
        except StoreError as error:  # the next attempt tells it
            print(f"THE MIRROR does not know how this attempt ended: {error}", flush=True)

    telling = threading.Thread(target=tell, name="last-words", daemon=True)
    telling.start()
    telling.join(_LAST_WORDS_S)  # a mirror that hangs must not use up the grace time


def _earlier(run: Run, replicas: Replicas) -> list[dict[str, Any]]:
    """Return the records of earlier attempts, unless these died too often. Rank 0 only."""
    survey = replicas.survey()
    records, saved_by = survey.records, {commit.attempt for commit in survey.with_damaged}
    most = run.launch.max_attempts_without_progress
    attempts.refuse_crash_loop(records, saved_by, most, run.run_dir)
    return records


class _Notes:
    """What rank 0 notes of its attempt: now and then, for if it dies, and at its end."""

    every_s = 30.0

    def __init__(self, replicas: Replicas, attempt: Attempt) -> None:
        self._replicas, self._attempt = replicas, attempt
        self._facts: Callable[[], dict[str, Any]] = dict
        self._over = threading.Event()

    def keep(self, state: State, saver: Saver, stop: Stop, timing: Timing, began: float) -> None:
        """Begin to note where the attempt is."""
        first_step, first_s = state.step, 0.0

        def facts() -> dict[str, Any]:
            nonlocal first_s
            now = time.monotonic()
            if state.step == first_step and stop.boundaries <= 1:
                first_s = now - began
            return {
                "last_step": state.step,
                "save_s": saver.save_s,
                "starting_s": round(first_s, 3),
                "training_s": round(now - began - first_s, 3),
                **_totals(timing),
            }

        self._facts = facts
        self._facts()
        threading.Thread(target=self._note, name="attempt-notes", daemon=True).start()

    def _note(self) -> None:
        wait_s = 0.2
        while not self._over.wait(wait_s):
            facts = self._facts()
            wait_s = min(2 * wait_s, self.every_s)
            with suppress(StoreError):  # the saves will say so
                self._replicas.write_heartbeat(self._attempt, {"told": lineage.now(), **facts})

    def end(self) -> dict[str, Any]:
        """Stop; return what there is to say at the end."""
        self._over.set()
        return self._facts()


def _totals(timing: Timing) -> dict[str, Any]:
    """Return what the record of an attempt says of its steps."""
    totals = timing.totals()
    return {
        "peak_bytes": list(totals.peak_bytes),
        "samples_per_s": round(totals.samples / max(totals.seconds, 1e-9), 1),
        "step_p50_s": round(totals.step_p50_s, 6),
        "step_p95_s": round(totals.step_p95_s, 6),
        "data_wait_s": round(totals.data_wait_s, 3),
        "eval_s": round(totals.eval_s, 3),
        "save_stall_s": round(totals.save_stall_s, 3),
        **({"mfu": round(totals.mfu, 4)} if totals.mfu is not None else {}),
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
        say=job.tracker.message,
    )


def _watchdog(
    run: Run, world: World, replicas: Replicas, attempt: Attempt, stop: Stop
) -> watchdog_.Watchdog:
    def leave_stacks(text: str) -> None:
        key = f"stacks/attempt-{attempt.number:04d}-rank-{world.rank}.txt"
        writing = threading.Thread(
            target=replicas.run.replace, args=(key, text.encode()), name="stacks", daemon=True
        )
        writing.start()
        writing.join(_STACKS_S)  # the file system may be what hangs

    def leave(text: str) -> None:
        if world.rank == 0:
            ending = {"ended": lineage.now(), "outcome": attempts.DIED, "error": text}
            writing = threading.Thread(target=replicas.amend, args=(attempt, ending), daemon=True)
            writing.start()
            writing.join(_STACKS_S)
        outcome.exit_to_resume(text)

    return watchdog_.Watchdog(
        world,
        boundaries=lambda: stop.boundaries,
        watchdog_s=run.launch.watchdog_s,
        peer_timeout_s=run.launch.peer_timeout_s,
        leave_stacks=leave_stacks,
        leave=leave,
        session=attempt.token,
    )


def _refuse_no_time(run: Run, starting_s: float, seconds: float) -> None:
    """Attempts that get nowhere in their time would follow one another for ever. Rank 0 only."""
    limit_s = validate.seconds(run.trainer.max_time or "")
    if limit_s is not None and starting_s + seconds >= limit_s:
        raise ConfigError(
            f"trainer.max_time={run.trainer.max_time} was over before a step was taken or an "
            f"evaluation done; starting took {starting_s:.1f} s. Give more"
        )


def _deadline(run: Run, began: float) -> Callable[[float], bool]:
    """Return what tells whether it is time to leave: `max_time` is over, or the job's end near."""
    limit_s = validate.seconds(run.trainer.max_time or "")
    end_s = slurm.end_time_s()

    def is_over(reserve_s: float) -> bool:
        if limit_s is not None and time.monotonic() - began >= limit_s:
            return True
        return end_s is not None and time.time() >= end_s - _END_SPARE_S - reserve_s

    return is_over


def _refuse_different_configs(stored: Mapping[str, Any], world: World) -> None:
    """Under torchrun every rank composes for itself; make sure that they found the same."""
    text = json.dumps(stored, sort_keys=True, default=str)
    digests = world.gather(hashlib.blake2b(text.encode()).hexdigest())

    def compare() -> None:
        other = next((rank for rank, d in enumerate(digests) if d != digests[0]), None)
        if other is not None:
            raise ConfigError(
                f"ranks 0 and {other} have different configurations; start every node with the "
                "same command, configuration files and environment"
            )

    world.run_on_rank0(compare)


def _facts(world: World, threads: int) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "world_size": world.size,
        "threads": threads,
        "device": world.device.type,
        **slurm.job_metadata(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }


def _load(
    run: Run, stored: Mapping[str, Any], job: Job, replicas: Replicas, attempt: Attempt
) -> tuple[Start, State]:
    """Load the newest checkpoint that every rank finds whole; set damaged ones aside.

    Collective.
    """
    world = job.world
    damaged: list[tuple[Commit, tuple[str, ...]]] = []
    while True:
        start = world.run_on_rank0(
            lambda: resume.choose(replicas, run, stored, attempt=attempt.number, damaged=damaged)
        )
        try:
            state = world.run_on_all(partial(resume.load, job, start, run.store))
        except DamagedError as error:
            is_last = len(start.urls) == 1
            if start.is_fork or start.commit is None or (start.is_named and is_last):
                world.run_on_rank0(partial(_refuse_damaged, run, start, error))
            else:
                damaged.append((start.commit, start.urls))
                world.run_on_rank0(partial(_set_aside, replicas, start, error))
            continue
        if start.manifest is None and run.init.weights:
            say = job.tracker.message  # of rank 0
            start = world.run_on_all(
                partial(resume.load_weights, job.model, run.init, run.store, warn=say)
            )
            if job.ema is not None:
                job.ema.restart()
        return start, state


def _set_aside(replicas: Replicas, start: Start, error: DamagedError) -> None:
    """Mark what was proven wrong where it was; what other nodes may have is not."""
    store = next(store for store in replicas.stores if store.url == start.urls[0])
    is_elsewhere = isinstance(error, MissingError) and replicas.mirror is not None
    assert start.commit is not None  # noqa: S101 (for the type checker)
    if not is_elsewhere and start.commit.manifest_key in store.list(start.commit.folder):
        lineage.mark_damaged(store, start.commit, str(error))
    others = "its copy, or " if len(start.urls) > 1 else ""
    what = "NOT HERE" if is_elsewhere else "DAMAGED"
    print(f"{what}: {error}. Trying {others}the newest older one.", flush=True)


def _refuse_damaged(run: Run, start: Start, error: DamagedError) -> None:
    commits = lineage.commits(open_store(start.urls[0], run.store))
    older = [f"{commit.step:,}" for commit in reversed(commits) if commit.step < start.step]
    advice = f"resume from one of them with resume={older[0]}" if older else "there is no older one"
    raise DamagedError(f"{error}. Older whole steps: {', '.join(older) or 'none'}; {advice}")


def _mirror(
    run: Run, job: Job, replicas: Replicas, attempt: Attempt, start: Start
) -> Mirror | None:
    """Begin to copy; first what the mirror lacks of the checkpoint we start from. Collective."""
    if replicas.mirror is None:
        return None
    wanted = run.checkpoint
    retention = Retention(
        replicas.mirror,
        attempt,
        keep_last=wanted.mirror_keep_last,
        keep_best=wanted.mirror_keep_best,
        keep_every_steps=wanted.mirror_keep_every_steps,
        metric=wanted.metric,
        mode=wanted.mode,
    )
    mirror = Mirror(
        replicas.run,
        replicas.mirror,
        job.world,
        attempt,
        retention=retention,
        also=lambda: _history(replicas.run),
    )
    if start.manifest is not None and job.world.run_on_rank0(lambda: _is_own(replicas, start)):
        mirror.submit(start.manifest)
    return mirror


def _is_own(replicas: Replicas, start: Start) -> bool:
    """Return whether the run's own store has the checkpoint that the attempt starts from."""
    if start.is_fork or start.commit is None or start.urls[0] != replicas.run.url:
        return False
    return start.commit.manifest_key in replicas.run.list(start.commit.folder)


def _history(store: Store) -> dict[str, bytes]:
    """Return what a run has besides checkpoints that must not be lost with its store."""
    found = {name: jsonl.read_text(store, name) for name in _LINES}
    with suppress(FileNotFoundError):
        found["config.yaml"] = store.read("config.yaml")
    return found


def _saver(run: Run, job: Job, target: SaveTarget, grace_s: float, mirror: Mirror | None) -> Saver:
    wanted = run.checkpoint
    retention = Retention(
        target.store,
        target.attempt,
        keep_last=wanted.keep_last,
        keep_best=wanted.keep_best,
        keep_every_steps=wanted.keep_every_steps,
        metric=wanted.metric,
        mode=wanted.mode,
    )
    policy = SavePolicy(
        every=Every(steps=wanted.every_steps, epochs=wanted.every_epochs),
        every_s=wanted.every_s,
        timeout_s=wanted.timeout_s,
        grace_s=grace_s,
        stop_on_error=wanted.on_error == "stop",
    )
    hooks = SaveHooks(
        before_commit=job.tracker.flush,
        log=job.tracker.message,
        saved=getattr(job.tracker, "saved", lambda save: None),
    )
    return Saver(target, policy, retention, mirror, hooks)


def _record_start(
    run: Run,
    stored: Mapping[str, Any],
    job: Job,
    replicas: Replicas,
    attempt: Attempt,
    start: Start,
    state: State,
) -> None:
    """Write where the attempt starts from, before it saves anything. Rank 0 only."""
    store = replicas.run
    if replicas.mirror is not None and start.manifest is not None and not _is_own(replicas, start):
        for name in _LINES:  # the figures of the timeline that goes on
            with suppress(FileNotFoundError):
                store.replace(name, replicas.mirror.read(name))
    own = None if start.is_fork else start.commit
    origin = {"step": own.step if own else 0, "attempt": own.attempt if own else None}
    plan = {"max_steps": job.max_steps, "steps_per_epoch": job.data.steps_per_epoch}
    changed = [str(difference) for difference in start.differences]
    replicas.amend(
        attempt,
        {"resumed_from": origin, "first_step": state.step, **plan, "changed": changed},
    )
    store.replace("config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(stored))).encode())
    job.tracker.start(
        {
            "run_dir": run.run_dir,
            "store": store,
            "attempt": attempt.number,
            "step": state.step,
            "last_eval_step": state.last_eval_step,
            "max_steps": job.max_steps,
            "steps_per_epoch": job.data.steps_per_epoch,
            "world_size": job.world.size,
            "config": stored,
            "peak_flops_per_s": job.peak_flops_per_s,
            "run_id": attempts.run_id(replicas.records()),
            "eval_every": job.eval_every if job.evaluation is not None else None,
            "save_every": Every(
                steps=run.checkpoint.every_steps, epochs=run.checkpoint.every_epochs
            ),
            "save_every_s": run.checkpoint.every_s,
        }
    )
    record = lineage.records(store)[-1]
    banner = [*messages.banner(run, job, record), *job.notes]
    for line in [*banner, *_resume_lines(run, job, replicas, start, state, record)]:
        job.tracker.message(line)


def _resume_lines(
    run: Run,
    job: Job,
    replicas: Replicas,
    start: Start,
    state: State,
    record: Mapping[str, Any],
) -> list[str]:
    lines = [*(f"PASSED OVER: {text}" for text in start.skipped), *start.filled]
    if start.manifest is None or start.commit is None:
        return lines
    left = pluralize(job.max_steps - state.step, "step")
    how = f"forking {start.urls[0]}/{start.commit.folder}" if start.is_fork else "resuming"
    copy = "" if start.is_fork or _is_own(replicas, start) else f" of {run.checkpoint.mirror}"
    lines.append(f"{how} from step {state.step:,}{copy}; {left} left")
    lines += filter(None, [job.data.rereads(state.cursor)])
    if start.differences:
        lines.append("settings that changed since then:")
        lines += [f"  {difference}" for difference in start.differences]
    saved_in = open_store(start.urls[0], run.store) if start.is_fork else replicas.run
    number = start.manifest.attempt
    then = next((r for r in lineage.records(saved_in) if r["attempt"] == number), record)
    facts = ("world_size", "threads", "device", "versions")
    changed = [
        f"{key} {then.get(key)} -> {record[key]}" for key in facts if then.get(key) != record[key]
    ]
    if changed:
        lines.append(f"not bit-exact from here on, because of {'; '.join(changed)}")
    return lines
