"""Record of an attempt in the run's stores: heartbeats while it runs, and an outcome at its end."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from trainer.checkpoint import attempts, crash_loop, lineage
from trainer.checkpoint.lineage import Attempt
from trainer.checkpoint.replicas import Replicas
from trainer.checkpoint.saver import Saver
from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.core.state import State
from trainer.errors import StoreError
from trainer.monitoring.timing import Timing
from trainer.training.job import Job

_HEARTBEAT_S = 30.0
"""Maximum seconds between two heartbeats."""
_FIRST_HEARTBEAT_S = 0.2
_MIRROR_S = 5.0
"""Maximum seconds for the mirror to store the end of an attempt."""
_ERROR_LENGTH = 2000

Progress = Callable[[], dict[str, Any]]


class AttemptRecord:
    """The record of one attempt, which rank 0 writes.

    Args:
        replicas: the run's stores.
        attempt: the attempt.
        is_writer: whether this is rank 0.
    """

    def __init__(self, replicas: Replicas, attempt: Attempt, *, is_writer: bool) -> None:
        self.attempt = attempt
        self.outcome: dict[str, Any] = {"outcome": attempts.DIED}
        """Outcome, and the error or reason, to be written at the end."""
        self._replicas, self._is_writer = replicas, is_writer
        self._progress: Progress = dict
        self._ended = threading.Event()

    def fail(self, error: BaseException) -> str:
        """Set the error and its cause, unless there is one; return its text."""
        text = f"{type(error).__name__}: {error}"[:_ERROR_LENGTH]
        for key, value in {"error": text, **crash_loop.failure_facts(error)}.items():
            self.outcome.setdefault(key, value)
        return text

    def start_heartbeat(self, progress: Progress) -> None:
        """Write what `progress` returns from time to time; it is used if the attempt is killed."""
        if self._is_writer:
            self._progress = progress
            progress()
            threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _beat(self) -> None:
        wait_s = _FIRST_HEARTBEAT_S
        while not self._ended.wait(wait_s):
            values = self._progress()
            wait_s = min(2 * wait_s, _HEARTBEAT_S)
            with suppress(StoreError):  # the next save reports it
                heartbeat = {"told": lineage.now(), **values}
                self._replicas.write_heartbeat(self.attempt, heartbeat)

    def end(self) -> None:
        """Stop the heartbeat and write the outcome."""
        self._ended.set()
        if not self._is_writer:
            return
        ending = {"ended": lineage.now(), **self._progress(), **self.outcome}
        lineage.amend(self._replicas.run, self.attempt, ending)
        if self._replicas.mirror is not None:  # a mirror that hangs must not use up the grace time
            run_within(_MIRROR_S, "attempt-end", lambda: self._end_in_mirror(ending))

    def _end_in_mirror(self, ending: Mapping[str, Any]) -> None:
        try:
            lineage.amend(self._replicas.stores[-1], self.attempt, ending)
        except StoreError as error:
            text = "the end of this attempt is not in the mirror; the next attempt copies it"
            print(f"warning: {text}: {error}", flush=True)


def run_within(seconds: float, name: str, task: Callable[[], object]) -> None:
    """Run `task` on a daemon thread called `name`; wait for it at most this long."""
    thread = threading.Thread(target=task, name=name, daemon=True)
    thread.start()
    thread.join(seconds)


@contextmanager
def recorded(
    replicas: Replicas, metadata: Mapping[str, Any], world: World
) -> Iterator[AttemptRecord]:
    """Begin an attempt, and write the end of its record in any case. Collective."""
    attempt = world.run_on_rank0(lambda: replicas.begin(metadata))
    record = AttemptRecord(replicas, attempt, is_writer=world.rank == 0)
    try:
        yield record
    except BaseException as error:
        record.fail(error)
        raise
    finally:
        record.end()


def progress_of(
    job: Job, state: State, saver: Saver, stop: Stop, timing: Timing, began: float
) -> Progress:
    """Return a function that returns the attempt's progress as the record's values.

    Args:
        job: the training run.
        state: the state of the run.
        saver: the saver.
        stop: the source of the number of step boundaries.
        timing: the timing of the steps.
        began: start of the attempt by `time.monotonic`.
    """
    first_step, starting_s = state.step, 0.0

    def progress() -> dict[str, Any]:
        nonlocal starting_s
        now = time.monotonic()
        if state.step == first_step and stop.boundaries <= 1:
            starting_s = now - began
        totals = timing.totals()
        return {
            "last_step": state.step,
            **({"best": {"metric": job.metric, **best}} if (best := state.best) else {}),
            "committed_step": saver.committed_step,
            "save_s": saver.save_s,
            "starting_s": round(starting_s, 3),
            "training_s": round(now - began - starting_s, 3),
            "peak_bytes": list(totals.peak_bytes),
            "samples_per_s": round(totals.samples / max(totals.seconds, 1e-9), 1),
            "step_p50_s": round(totals.step_p50_s, 6),
            "step_p95_s": round(totals.step_p95_s, 6),
            "data_wait_s": round(totals.data_wait_s, 3),
            "eval_s": round(totals.eval_s, 3),
            "save_stall_s": round(totals.save_stall_s, 3),
            **({"mfu": round(totals.mfu, 4)} if totals.mfu is not None else {}),
        }

    return progress
