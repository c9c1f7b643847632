"""Ranks that stand still or are gone: found by a thread on every rank, told, and left behind.

A rank blocked in a collective runs no Python, and waits for a peer that is gone as long as the
group's timeout says. So a thread on each rank tells the others, through the store that the ranks
met at, that it lives and how far its training is. Rank 0 reads what all tell and judges; the
others read its judgement, and whether it lives itself.
"""

import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from trainer.distributed import World
from trainer.errors import PeerFailedError, PeerLostError, PerdureError

_TOLD = "told/{}"
_FAILED, _GONE = "failed", "gone"
_VERDICT = "verdict"
_WAITING = ("torch/distributed/", "torch/autograd/", "trainer/preemption.py", "trainer/distributed")
"""Files in which a rank waits for others (the backward pass reduces gradients)."""
_CULPRIT_S = 5.0
"""How long after a broken connection a rank may take to say that it has failed itself."""
_LAST_WORDS_S = 30.0
"""How long a rank that has failed may take to close what is open; its launcher shows its error."""


class Watchdog:
    """Watches this rank's training and, on rank 0, all ranks'.

    Args:
        world: the ranks.
        boundaries: how many boundaries the training has passed.
        watchdog_s: the training may stand still for so long; None: for ever.
        peer_timeout_s: a rank may be silent for so long.
        leave_stacks: keeps the stacks of this rank, given as text.
        leave: ends this process with the reason.
        session: what no other attempt on the same store has.
    """

    def __init__(
        self,
        world: World,
        *,
        boundaries: Callable[[], int],
        watchdog_s: float | None,
        peer_timeout_s: float,
        leave_stacks: Callable[[str], None],
        leave: Callable[[str], None],
        session: str,
    ) -> None:
        self._world = world
        self._boundaries = boundaries
        self._watchdog_s, self._peer_timeout_s = watchdog_s, peer_timeout_s
        self._leave_stacks, self._leave = leave_stacks, leave
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._every_s = min(max(peer_timeout_s / 20, 0.1), _CULPRIT_S / 4)
        if watchdog_s is not None:
            self._every_s = min(self._every_s, max(watchdog_s / 10, 0.1))
        self._store: Any = None
        if world.size > 1:
            client = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=peer_timeout_s / 2),
            )
            self._store = PrefixStore(f"watchdog/{session}", client)
        self._heard = {rank: ("", time.monotonic()) for rank in range(world.size)}
        self._moved = (-1, time.monotonic())
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watching; before the ranks part."""
        self._over.set()
        self._thread.join(self._peer_timeout_s)

    def failed(self, why: str) -> None:
        """Tell the other ranks that it is this one that failed."""
        self._announce(_FAILED, f"rank {self._world.rank} failed: {why}")

    def gone(self) -> None:
        """Tell the other ranks that this one, which has failed, has closed everything."""
        self._announce(_GONE, "")

    def _announce(self, key: str, text: str) -> None:
        if self._store is not None:
            with suppress(RuntimeError):  # rank 0 has gone first, and its store with it
                self._store.set(key, text)

    def explain(self, error: BaseException) -> PerdureError | None:
        """Return who failed or was lost, if `error` comes of a peer that is gone.

        Waits some seconds for the one that failed to say so.
        """
        if self._store is None or not _is_of_a_connection(error):
            return None
        until = time.monotonic() + _CULPRIT_S
        cause = str(error).strip().partition("\n")[0]
        try:
            while time.monotonic() < until:
                if self._store.check([_FAILED]):
                    return self._peer_failed()
                time.sleep(0.1)
            told = [json.loads(self._store.get(_TOLD.format(r))) for r in self._ranks()]
        except RuntimeError:  # the store went with rank 0
            return PeerLostError(f"rank 0 was lost: {cause}")
        silent = [_name(t) for t in told if time.time() - t["time"] > _CULPRIT_S / 2]
        return PeerLostError(f"{'; '.join(silent) or 'a rank'} was lost: {cause}")

    def _peer_failed(self) -> PeerFailedError:
        text = self._store.get(_FAILED).decode()
        until = time.monotonic() + _LAST_WORDS_S
        with suppress(RuntimeError):
            while time.monotonic() < until and not self._store.check([_GONE]):
                time.sleep(0.1)
        return PeerFailedError(text)

    # --- the thread ------------------------------------------------------------------------------

    def _ranks(self) -> range:
        return range(self._world.size)

    def _watch(self) -> None:
        failing_since: float | None = None
        while not self._over.wait(self._every_s):
            now = time.monotonic()
            count = self._boundaries()
            if count != self._moved[0]:
                self._moved = (count, now)
            stands = self._watchdog_s is not None and now - self._moved[1] > self._watchdog_s
            if self._store is None:
                if stands:
                    self._leave_stacks(python_stacks())
                    self._leave(self._stands_text([self._telling(now)]))
                continue
            try:
                self._talk(now, stands)
                failing_since = None
            except RuntimeError as error:  # what TCPStore raises, whatever happened
                failing_since = failing_since or now
                if now - failing_since > self._peer_timeout_s:
                    self._leave(
                        f"rank 0 was lost: its store has not answered for "
                        f"{self._peer_timeout_s:.0f} s ({error})"
                    )

    def _talk(self, now: float, stands: bool) -> None:
        telling = {**self._telling(now), "stands": stands}
        self._store.set(_TOLD.format(self._world.rank), json.dumps(telling))
        if self._store.check([_VERDICT]):
            verdict = json.loads(self._store.get(_VERDICT))
            if verdict["stacks"]:
                self._leave_stacks(python_stacks())
            self._leave(verdict["text"])
        judged = self._ranks() if self._world.rank == 0 else range(1)
        for rank in judged:
            key = _TOLD.format(rank)
            text = self._store.get(key).decode() if self._store.check([key]) else ""
            if text != self._heard[rank][0]:
                self._heard[rank] = (text, now)
        silent = [r for r in judged if now - self._heard[r][1] > self._peer_timeout_s]
        told = [json.loads(text) for text, _ in self._heard.values() if text]
        if silent:
            who = "; ".join(
                next((_name(t) for t in told if t["rank"] == rank), f"rank {rank}")
                for rank in silent
            )
            self._judge(f"{who} was lost: silent for {self._peer_timeout_s:.0f} s", stacks=False)
        elif any(t["stands"] for t in told):
            self._judge(self._stands_text(told), stacks=True)

    def _judge(self, text: str, *, stacks: bool) -> None:
        """On rank 0, let all know and leave; on others, leave rank 0 behind, or wait for it."""
        if self._world.rank == 0:
            self._store.set(_VERDICT, json.dumps({"text": text, "stacks": stacks}))
            if stacks:
                self._leave_stacks(python_stacks())
            time.sleep(3 * self._every_s)  # the store is in this process; let all read it
            self._leave(text)
        elif not stacks:
            self._leave(text)

    def _telling(self, now: float) -> dict[str, Any]:
        waits, where = _place(self._main)
        return {
            "rank": self._world.rank, "host": socket.gethostname(), "pid": os.getpid(),
            "time": time.time(), "boundary": self._moved[0],
            "still_s": round(now - self._moved[1], 1), "waits": waits, "where": where,
        }  # fmt: skip

    def _stands_text(self, told: list[dict[str, Any]]) -> str:
        least = min(t["boundary"] for t in told)
        behind = [t for t in told if t["boundary"] == least]
        behind = [t for t in behind if not t["waits"]] or behind
        who = "; ".join(f"{_name(t)} in {t['where']}" for t in behind)
        return (
            f"no step for {self._watchdog_s:.0f} s (launch.watchdog_s). Behind: {who}. The stacks "
            "of all ranks lie in the run's stacks/"
        )


def python_stacks() -> str:
    """Return the Python stacks of all threads, and the flight recorder's trace where there is."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read()
    return text + _flight_recorder()


def _flight_recorder() -> str:
    """Return NCCL's recent collectives as JSON; empty without GPUs, or where torch has it not."""
    if not (dist.is_nccl_available() and dist.is_initialized() and dist.get_backend() == "nccl"):
        return ""
    dump = getattr(dist.distributed_c10d, "_dump_nccl_trace_json", None)
    return f"\nNCCL flight recorder:\n{dump().decode()}\n" if dump else ""


def _place(thread: int | None) -> tuple[bool, str]:
    """Return whether a thread seems to wait for other ranks, and the line it is at."""
    frame = sys._current_frames().get(thread or 0)
    where, waits = "?", False
    while frame is not None:
        code = frame.f_code
        if where == "?":
            where = f"{code.co_filename}:{frame.f_lineno} ({code.co_name})"
        waits = waits or any(part in code.co_filename for part in _WAITING)
        frame = frame.f_back
    return waits, where


def _is_of_a_connection(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "nccl", "connection closed by peer", "connection reset")
    )


def _name(told: dict[str, Any]) -> str:
    return f"rank {told['rank']} (process {told['pid']} on {told['host']})"
