"""Ranks of a training, forked from one process that has imported everything.

The ranks of every attempt start in tenths of a second. The process never computes and never has a
second thread: a fork copies a pool of threads without its threads, and a wait for one of them never
ends.
"""

import gc
import importlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]

EPOCHS, STEPS_PER_EPOCH, GLOBAL_BATCH_SIZE = 8, 20, 12
LAST_STEP = EPOCHS * STEPS_PER_EPOCH
KEEP_LAST = 2

# The settings of tests/support/run_commands.py, with a model so wide that a save writes
# 5 MB and takes as long as some steps.
SETTINGS = [
    "data=synthetic", "sample.shape=[1,8,8]", "data.eval_samples=70",
    f"data.train_samples={STEPS_PER_EPOCH * GLOBAL_BATCH_SIZE}",
    "model.batch_norm=true", "model.channels=[4,8]", "model.hidden=10000", "scheduler=cosine",
    f"trainer.max_epochs={EPOCHS}", f"trainer.global_batch_size={GLOBAL_BATCH_SIZE}",
    "trainer.log_every_steps=1", "trainer.clip_norm=1.0", "trainer.eval_every_steps=7",
    "checkpoint.every_steps=3", f"checkpoint.keep_last={KEEP_LAST}",
    "launch.threads=1", "launch.device=cpu",
    "launch.max_attempts_without_progress=0",  # kills may come faster than saves
]  # fmt: skip

POLL_S = 0.0005
_PATIENCE_S = 180.0
"""Timeout of every wait, in seconds; the machine may have other work."""


class Broken(Exception):
    """A promise does not hold."""


_children: set[int] = set()
"""Process ids of all that is alive, so that nothing outlives this process."""

_IMPORTS = (
    "torch.distributed.checkpoint.default_planner", "torch.distributed.tensor",
    "torch._dynamo",  # every optimizer imports it
    "torchmetrics", "hydra", "omegaconf", "trainer.run", "trainer.training.attempt",
    "trainer.schedule", "trainer.task", "trainer.data.synthetic", "trainer.tracking.console",
    "models.cnn", "scripts.compare_runs",
)  # fmt: skip


def preload() -> None:
    """Import all that a rank needs, from this checkout."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "PERDURE_OUTCOME"):
        os.environ.pop(name, None)
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    sys.path[0] = str(ROOT)
    for name in _IMPORTS:
        importlib.import_module(name)
    from hydra.core.plugins import Plugins

    Plugins.instance()  # looks through packages, once
    gc.freeze()  # or the collector of a child would copy every page


def fork(body: Callable[[], int], log: Path) -> int:
    """Run `body` in a child that dies with this process; return its process id."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"there are {threads} threads here; a fork could hang")
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _be_child(body, log)
    _children.add(pid)
    return pid


def _be_child(body: Callable[[], int], log: Path) -> NoReturn:
    code: Any = 1
    try:
        from trainer.core import threads

        threads.die_with_parent()
        os.setsid()  # a Ctrl-C is meant for the parent
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = body()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def ask(question: Callable[[], Any], log: Path) -> Any:
    """Return the answer of a child, which may compute; it travels as JSON."""
    reading, writing = os.pipe()

    def answer() -> int:
        os.close(reading)
        try:
            finding = {"answer": question()}
        except Exception as error:
            finding = {"error": "".join(traceback.format_exception(error)).rstrip()}
        with open(writing, "w") as pipe:
            json.dump(finding, pipe)
        return 0

    pid = fork(answer, log)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    _children.discard(pid)
    finding = json.loads(text or '{"error": "the process that examined the run was killed"}')
    if "error" in finding:
        raise Broken(finding["error"])
    return finding["answer"]


def kill_children() -> None:
    """Kill all children."""
    for pid in tuple(_children):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        _children.discard(pid)


class Ranks:
    """The processes of one attempt."""

    def __init__(self, run_dir: Path, count: int, log: Path) -> None:
        self.codes: dict[int, int] = {}
        """Exit codes of the ranks that exited early."""
        port = _free_port()
        self._pids = {
            rank: fork(lambda rank=rank: _train(run_dir, rank, count, port), log)
            for rank in range(count)
        }

    def alive(self) -> list[int]:
        """Return the ranks that are alive."""
        for rank, pid in tuple(self._pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._bury(rank, status)
        return list(self._pids)

    def kill(self, ranks: Sequence[int]) -> None:
        """SIGKILL ranks at the same time, and wait until the kernel is done with them."""
        for rank in ranks:
            os.kill(self._pids[rank], signal.SIGKILL)
        for rank in ranks:
            self._bury(rank, os.waitpid(self._pids[rank], 0)[1])

    def _bury(self, rank: int, status: int) -> None:
        _children.discard(self._pids.pop(rank))
        code = os.waitstatus_to_exitcode(status)
        if code != -signal.SIGKILL:
            self.codes[rank] = code

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Wait until a condition holds; return False if a rank exited early before."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while not condition():
            self.alive()
            if self.codes:
                return False
            if time.monotonic() > deadline_s:
                raise Broken(f"an attempt did not get on for {_PATIENCE_S:.0f} s")
            time.sleep(POLL_S)
        return True

    def let_end(self) -> None:
        """Wait until all ranks have left, and all with success."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while self.alive() and not any(self.codes.values()):
            if time.monotonic() > deadline_s:
                raise Broken(f"an attempt did not end within {_PATIENCE_S:.0f} s")
            time.sleep(0.01)
        if any(self.codes.values()):
            raise Broken(f"no rank was killed; the exit codes are {self.codes}")


def _train(run_dir: Path, rank: int, count: int, port: int) -> int:
    """Be a rank: a user's command, with the environment that torchrun would give it."""
    from trainer import run

    if count > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    return run.main([*SETTINGS, f"name={run_dir.name}", f"run_dir={run_dir}"])


def _free_port() -> int:
    """Return a free port below those that the kernel assigns automatically."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
