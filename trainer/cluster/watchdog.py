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

from trainer.cluster.agreement import RankEndedError
from trainer.cluster.world import World
from trainer.errors import PeerFailedError, PeerLostError, PerdureError

_TOLD = "told/{}"
_FAILED, _GONE = "failed", "gone"
_VERDICT = "verdict"
_WAITING = (
    "torch/distributed/", "torch/nn/parallel/", "torch/autograd/", "trainer/cluster/stop.py",
    "trainer/cluster/world",
)  # fmt: skip
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
        self._every_s = min(max(peer_timeout_s / 20, 0.1), _CULPRIT_S / 5)
        if watchdog_s is not None:
            self._every_s = min(self._every_s, max(watchdog_s / 10, 0.1))
        now = time.monotonic()
        self._moved = (-1, now)
        self._heard = dict.fromkeys(range(world.size), ("", now))  # and when it last changed
        self._hears = list(self._heard) if world.rank == 0 else [0]
        self._board = dict.fromkeys((_VERDICT, _FAILED, _GONE), "")
        self._answered = now
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
            for key in self._board if world.rank == 0 else ():
                self._store.compare_set(key, "", "")  # unless somebody was faster
            self._tell()
            threading.Thread(target=self._talk, name="watchdog-talk", daemon=True).start()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watching; before the ranks part."""
        self._over.set()
        self._thread.join(self._peer_timeout_s)

    def failed(self, why: str) -> None:
        """Tell the other ranks that it is this one that failed."""
        rank = self._world.rank
        self._announce(_FAILED, json.dumps({"rank": rank, "text": f"rank {rank} failed: {why}"}))

    def gone(self) -> None:
        """Tell the other ranks that this one, which has failed, has closed everything."""
        self._announce(_GONE, "yes")

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
        self._hears = list(self._heard)
        began = time.monotonic()
        while time.monotonic() < began + _CULPRIT_S and not self._board[_FAILED]:
            time.sleep(0.05)
        if self._board[_FAILED]:
            until = time.monotonic() + _LAST_WORDS_S
            while time.monotonic() < until and not self._board[_GONE]:
                time.sleep(0.05)
            failed = json.loads(self._board[_FAILED])
            if self._world.rank == 0:
                self._wait_until_known(failed["rank"])
            return PeerFailedError(failed["text"])
        cause = str(error).strip().partition("\n")[0]
        if self._answered < began + _CULPRIT_S / 2:  # the store went with rank 0
            return PeerLostError(f"{self._name(0)} was lost: {cause}")
        silent = [self._name(r) for r in self._heard if self._heard[r][1] < began + _CULPRIT_S / 2]
        return PeerLostError(f"{'; '.join(silent) or 'a rank'} was lost: {cause}")

    def _wait_until_known(self, failed: int) -> None:
        """Let the others hear who failed, before the store goes with this process."""
        until = time.monotonic() + _CULPRIT_S
        others = [rank for rank in self._heard if rank not in (0, failed)]
        while time.monotonic() < until:
            told = [json.loads(self._heard[rank][0] or "{}") for rank in others]
            if all(each.get("knows_failure") for each in told):
                return
            time.sleep(0.05)

    # --- one thread talks; whatever TCPStore promises, its calls may hang with the server ---------

    def _talk(self) -> None:
        while not self._over.wait(self._every_s):
            try:
                self._tell()
                for key in self._board:
                    self._board[key] = self._read(key)
                for rank in self._hears:
                    text = self._read(_TOLD.format(rank))
                    if text != self._heard[rank][0]:
                        self._heard[rank] = (text, time.monotonic())
            except RuntimeError:  # what TCPStore raises; the other thread judges the silence
                continue
            self._answered = time.monotonic()

    def _read(self, key: str) -> str:
        text: str = self._store.get(key).decode()
        return text

    def _tell(self) -> None:
        self._store.set(_TOLD.format(self._world.rank), json.dumps(self._telling()))

    # --- and one judges --------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over.wait(self._every_s):
            now, count = time.monotonic(), self._boundaries()
            if count != self._moved[0]:
                self._moved = (count, now)
            if self._store is None:
                if self._stands():
                    self._leave_stacks(python_stacks())
                    self._leave(self._stands_text([self._telling()]))
            elif self._board[_VERDICT]:
                verdict = json.loads(self._board[_VERDICT])
                if verdict["stacks"]:
                    self._leave_stacks(python_stacks())
                self._leave(verdict["text"])
            elif now - self._answered > self._peer_timeout_s:
                self._leave(f"{self._name(0)} was lost: its store is silent")
            else:
                self._judge(now)

    def _judge(self, now: float) -> None:
        """On rank 0, judge all ranks, let all know and leave; on others, judge rank 0."""
        judged = self._heard if self._world.rank == 0 else [0]
        silent = [r for r in judged if now - self._heard[r][1] > self._peer_timeout_s]
        told = [json.loads(text) for text, _ in self._heard.values() if text]
        stand = self._world.rank == 0 and any(t["stands"] for t in told)
        if silent:
            who = "; ".join(map(self._name, silent))
            text = f"{who} was lost: silent for {self._peer_timeout_s:.0f} s"
        elif stand:
            text = self._stands_text(told)
        else:
            return
        if self._world.rank == 0:
            verdict = {"text": text, "stacks": stand and not silent}
            self._announce(_VERDICT, json.dumps(verdict))
            if verdict["stacks"]:
                self._leave_stacks(python_stacks())
            time.sleep(3 * self._every_s)  # the store may be in this process; let all read it
        self._leave(text)

    def _stands(self) -> bool:
        still_s = time.monotonic() - self._moved[1]
        return self._watchdog_s is not None and still_s > self._watchdog_s

    def _name(self, rank: int) -> str:
        text = self._heard[rank][0]
        return _name(json.loads(text)) if text else f"rank {rank}"

    def _telling(self) -> dict[str, Any]:
        waits, where = _place(self._main)
        return {
            "rank": self._world.rank, "host": socket.gethostname(), "pid": os.getpid(),
            "time": time.time(), "boundary": self._moved[0], "stands": self._stands(),
            "waits": waits, "where": where, "knows_failure": bool(self._board[_FAILED]),
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
    return isinstance(error, RankEndedError) or (
        isinstance(error, RuntimeError)
        and any(word in text for word in ("gloo", "nccl", "closed by peer", "connection reset"))
    )


def _name(told: dict[str, Any]) -> str:
    return f"rank {told['rank']} (process {told['pid']} on {told['host']})"
