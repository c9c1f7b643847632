"""Detect stalled and lost ranks from background threads, report them, and exit.

A rank blocked in a collective runs no Python, and waits for a lost peer until the group's timeout.
So on each rank one thread publishes a report through the rendezvous store and reads what others
published, and a second thread checks it. Rank 0 checks all ranks and publishes a verdict;
the other ranks follow the verdict and check rank 0. There are two threads because store calls may
hang with the server, regardless of TCPStore's timeout.
"""

import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from trainer.cluster.agreement import RankEndedError
from trainer.cluster.world import World
from trainer.errors import PeerFailedError, PeerLostError, PerdureError

_VERDICT, _FAILURE, _CLOSED = "verdict", "failure", "closed"  # store keys, empty until set
_COLLECTIVES = (
    "torch/distributed/", "torch/nn/parallel/", "torch/autograd/", "trainer/cluster/stop.py",
    "trainer/cluster/world",
)  # fmt: skip
"""Files in which a rank waits for others (the backward pass reduces gradients)."""
_CULPRIT_S = 5.0
"""Seconds to wait, after a broken connection, for a failed rank's report."""
_CLOSING_S = 30.0
"""Seconds to wait for a failed rank to close its files; its launcher prints its error."""


class Report(NamedTuple):
    """Progress of one rank."""

    rank: int
    host: str
    pid: int
    time: float
    """Seconds since 1970; makes every report differ from the previous one."""
    boundary: int
    """Step boundaries passed."""
    is_stalled: bool
    is_waiting: bool
    """The main thread is probably waiting for other ranks."""
    line: str
    """Line that the main thread executes."""
    has_failure: bool
    """This rank has received another rank's failure."""

    @property
    def name(self) -> str:
        """Return the rank with its process and host."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Watchdog:
    """Watch of this rank's training and, on rank 0, of all ranks.

    Args:
        world: the ranks.
        boundaries: returns the number of step boundaries passed.
        watchdog_s: seconds without a step boundary until the rank is stalled; None: no limit.
        peer_timeout_s: seconds without a report until a rank is lost.
        write_stacks: stores the stacks of this rank, passed as text.
        exit_process: ends this process with the reason.
        session: key prefix that no other attempt on the same store uses.
    """

    def __init__(
        self,
        world: World,
        *,
        boundaries: Callable[[], int],
        watchdog_s: float | None,
        peer_timeout_s: float,
        write_stacks: Callable[[str], None],
        exit_process: Callable[[str], None],
        session: str,
    ) -> None:
        self._world = world
        self._boundaries = boundaries
        self._watchdog_s, self._peer_timeout_s = watchdog_s, peer_timeout_s
        self._write_stacks, self._exit_process = write_stacks, exit_process
        self._main_thread = threading.main_thread().ident
        self._stopped = threading.Event()
        self._interval_s = min(max(peer_timeout_s / 20, 0.1), _CULPRIT_S / 5)
        if watchdog_s is not None:
            self._interval_s = min(self._interval_s, max(watchdog_s / 10, 0.1))
        now = time.monotonic()
        self._boundary, self._boundary_s = -1, now
        self._reports: dict[int, Report | None] = dict.fromkeys(range(world.size))
        self._received_s = dict.fromkeys(range(world.size), now)
        self._followed = list(self._reports) if world.rank == 0 else [0]
        self._messages = dict.fromkeys((_VERDICT, _FAILURE, _CLOSED), "")
        self._store_answered_s = now
        self._store: Any = None
        if world.size > 1:
            client = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=peer_timeout_s),
            )
            self._store = PrefixStore(f"watchdog/{session}", client)
            for key in self._messages if world.rank == 0 else ():
                self._store.compare_set(key, "", "")  # keeps a message that is already set
            self._publish_report()
            threading.Thread(target=self._exchange, name="watchdog-store", daemon=True).start()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching. Call it before the process groups are destroyed."""
        self._stopped.set()
        self._thread.join(self._peer_timeout_s)

    def report_failure(self, reason: str) -> None:
        """Report to the other ranks that this rank failed."""
        rank = self._world.rank
        self._publish(_FAILURE, json.dumps({"rank": rank, "text": f"rank {rank} failed: {reason}"}))

    def report_closed(self) -> None:
        """Report to the other ranks that this failed rank has closed everything."""
        self._publish(_CLOSED, "yes")

    def explain(self, error: BaseException) -> PerdureError | None:
        """Return the error of the failed or lost peer if `error` is a broken connection to it.

        Waits up to 5 s for the peer's report.
        """
        if self._store is None or not _is_connection_error(error):
            return None
        self._followed = list(self._reports)
        began = time.monotonic()
        if self._wait_for(lambda: bool(self._messages[_FAILURE]), _CULPRIT_S):
            self._wait_for(lambda: bool(self._messages[_CLOSED]), _CLOSING_S)
            failure = json.loads(self._messages[_FAILURE])
            if self._world.rank == 0:  # its exit stops the store: let the others read it first
                others = [rank for rank in self._reports if rank not in (0, failure["rank"])]
                self._wait_for(lambda: self._have_failure(others), _CULPRIT_S)
            return PeerFailedError(failure["text"])
        cause = str(error).strip().partition("\n")[0]
        recent_s = began + _CULPRIT_S / 2
        if self._store_answered_s < recent_s:  # the store stopped with rank 0
            return PeerLostError(f"{self._name(0)} was lost: {cause}")
        silent = [self._name(rank) for rank, s in self._received_s.items() if s < recent_s]
        return PeerLostError(f"{'; '.join(silent) or 'a rank'} was lost: {cause}")

    def _have_failure(self, ranks: Sequence[int]) -> bool:
        reports = [self._reports[rank] for rank in ranks]
        return all(report is not None and report.has_failure for report in reports)

    def _wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)
        return True

    # --- the thread that uses the store ----------------------------------------------------------

    def _exchange(self) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                self._publish_report()
                for key in self._messages:
                    self._messages[key] = self._store.get(key).decode()
                for rank in self._followed:
                    report = Report(*json.loads(self._store.get(f"report/{rank}")))
                    if report != self._reports[rank]:
                        self._reports[rank] = report
                        self._received_s[rank] = time.monotonic()
            except RuntimeError:  # from TCPStore; the other thread detects the silence
                continue
            self._store_answered_s = time.monotonic()

    def _publish_report(self) -> None:
        self._store.set(f"report/{self._world.rank}", json.dumps(self._report()))

    def _publish(self, key: str, text: str) -> None:
        if self._store is not None:
            with suppress(RuntimeError):  # rank 0 exited first, and its store with it
                self._store.set(key, text)

    # --- the thread that checks ------------------------------------------------------------------

    def _watch(self) -> None:
        checked_s = time.monotonic()
        while not self._stopped.wait(self._interval_s):
            now, count = time.monotonic(), self._boundaries()
            self._leave_out(now - checked_s - self._interval_s, now)
            checked_s = now
            if count != self._boundary:
                self._boundary, self._boundary_s = count, now
            if self._store is None:
                if self._is_stalled():
                    self._write_stacks(python_stacks())
                    self._exit_process(self._stall_text([self._report()]))
            elif self._messages[_VERDICT]:
                verdict = json.loads(self._messages[_VERDICT])
                if verdict["stacks"]:
                    self._write_stacks(python_stacks())
                self._exit_process(verdict["text"])
            elif now - self._store_answered_s > self._peer_timeout_s:
                self._exit_process(f"{self._name(0)} was lost: its store does not answer")
            elif self._world.rank == 0:
                self._check_all(now)
            elif now - self._received_s[0] > self._peer_timeout_s:
                self._exit_process(self._silence_text([0]))

    def _leave_out(self, suspended_s: float, now: float) -> None:
        """Leave out time in which this process did not run, as between SIGSTOP and SIGCONT.

        The other ranks were usually suspended with it (`scontrol suspend`), so their silence and
        the step without an end mean nothing.
        """
        if suspended_s <= self._interval_s:
            return
        self._boundary_s = min(self._boundary_s + suspended_s, now)
        self._store_answered_s = min(self._store_answered_s + suspended_s, now)
        for rank, received_s in list(self._received_s.items()):
            self._received_s[rank] = min(received_s + suspended_s, now)

    def _check_all(self, now: float) -> None:
        """Publish a verdict and exit if a rank is lost or stalled. Rank 0 only."""
        silent = [rank for rank, s in self._received_s.items() if now - s > self._peer_timeout_s]
        reports = [report for report in self._reports.values() if report is not None]
        if silent:
            verdict = {"text": self._silence_text(silent), "stacks": False}
        elif any(report.is_stalled for report in reports):
            verdict = {"text": self._stall_text(reports), "stacks": True}
        else:
            return
        self._publish(_VERDICT, json.dumps(verdict))
        if verdict["stacks"]:
            self._write_stacks(python_stacks())
        time.sleep(3 * self._interval_s)  # the store may be in this process: let all ranks read it
        self._exit_process(str(verdict["text"]))

    def _is_stalled(self) -> bool:
        stalled_s = time.monotonic() - self._boundary_s
        return self._watchdog_s is not None and stalled_s > self._watchdog_s

    def _name(self, rank: int) -> str:
        report = self._reports[rank]
        return report.name if report is not None else f"rank {rank}"

    def _report(self) -> Report:
        is_waiting, line = _position(self._main_thread)
        return Report(
            self._world.rank, socket.gethostname(), os.getpid(), time.time(), self._boundary,
            self._is_stalled(), is_waiting, line, bool(self._messages[_FAILURE]),
        )  # fmt: skip

    def _silence_text(self, ranks: Sequence[int]) -> str:
        names = "; ".join(map(self._name, ranks))
        return f"{names} was lost: no report for {self._peer_timeout_s:.0f} s"

    def _stall_text(self, reports: Sequence[Report]) -> str:
        first = min(report.boundary for report in reports)
        behind = [report for report in reports if report.boundary == first]
        behind = [report for report in behind if not report.is_waiting] or behind
        lines = "; ".join(f"{report.name} in {report.line}" for report in behind)
        return (
            f"no step for {self._watchdog_s:.0f} s (launch.watchdog_s). Behind: {lines}. The "
            "stacks of all ranks are in the run's stacks/"
        )


def python_stacks() -> str:
    """Return the Python stacks of all threads, and NCCL's flight recorder trace if any."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read()
    return text + _flight_recorder()


def _flight_recorder() -> str:
    """Return NCCL's recent collectives as JSON; empty where torch does not have it."""
    if not (dist.is_nccl_available() and dist.is_initialized() and dist.get_backend() == "nccl"):
        return ""
    dump = getattr(dist.distributed_c10d, "_dump_nccl_trace_json", None)
    return f"\nNCCL flight recorder:\n{dump().decode()}\n" if dump else ""


def _position(thread: int | None) -> tuple[bool, str]:
    """Return whether a thread is probably waiting for other ranks, and the line it executes."""
    frame = sys._current_frames().get(thread or 0)
    line, is_waiting = "?", False
    while frame is not None:
        code = frame.f_code
        if line == "?":
            line = f"{code.co_filename}:{frame.f_lineno} ({code.co_name})"
        is_waiting = is_waiting or any(part in code.co_filename for part in _COLLECTIVES)
        frame = frame.f_back
    return is_waiting, line


_MISUSE = ("enforce fail", "invalid usage", "invalid argument", "ncclinvalid")
"""Parts of errors of collectives that come again, such as ranks with different shapes."""


def _is_connection_error(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, RankEndedError) or (
        isinstance(error, RuntimeError)
        and not any(word in text for word in _MISUSE)
        and any(word in text for word in ("gloo", "nccl", "closed by peer", "connection reset"))
    )
