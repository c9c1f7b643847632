"""How ranks come to be: one process, all local ranks through torch's elastic launch, torchrun."""

import json
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import Launch
from trainer.errors import DONE, FAILURE, RUN_AGAIN

_OUTCOME = "PERDURE_OUTCOME"
"""Names the file in which rank 0 leaves the exit code for the launcher that started it."""
_MAX_THREADS = 16
_PR_SET_PDEATHSIG = 1


def is_rank() -> bool:
    """Return whether a launcher has started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def ranks_on_this_node(launch: Launch) -> int:
    """Return how many ranks to start here: `launch.nproc`, or the number of GPUs, else 1."""
    if launch.nproc != "auto":
        return int(launch.nproc)
    if launch.device == "cpu":
        return 1
    import torch

    return max(torch.cuda.device_count(), 1)


def world_size(launch: Launch) -> int:
    """Return how many ranks there will be."""
    if is_rank():
        return int(os.environ["WORLD_SIZE"])
    return ranks_on_this_node(launch)


def device_name(launch: Launch) -> str:
    """Return the torch device of this rank."""
    import torch

    if launch.device == "cpu" or (launch.device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return f"cuda:{local_rank % max(torch.cuda.device_count(), 1)}"


def threads_per_rank(launch: Launch, stored: int | None) -> int:
    """Return CPU threads for this rank: as set, else as the first attempt had, else a share."""
    if launch.threads != "auto":
        return int(launch.threads)
    if stored is not None:
        return stored
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(len(os.sched_getaffinity(0)) // local, _MAX_THREADS))


def die_with_launcher() -> None:
    """Have the kernel kill this rank when the launcher that started it dies (prctl(2), Linux).

    Otherwise the ranks of a killed launcher would go on as a second job on the same run.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_outcome(code: int) -> None:
    """Tell the launcher that started us how the run ended. Rank 0 only."""
    path = os.environ.get(_OUTCOME)
    if path is not None:
        Path(path).write_text(str(code))


def rank_exit_code(code: int) -> int:
    """Return with what code a rank exits after an outcome that all ranks agree on.

    Elastic agents take any code but 0 for a crash, kill the other ranks and start again. So where
    our launcher reads the outcome, and for a preemption under torchrun, it is 0.
    """
    if _OUTCOME in os.environ or (code == RUN_AGAIN and "TORCHELASTIC_RUN_ID" in os.environ):
        return DONE
    return code


def report_crash(error: BaseException) -> None:
    """Leave an error where the elastic agent finds it, so that it is shown once; else print it."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        print(f"rank {os.environ.get('RANK')} failed:", file=sys.stderr)
        traceback.print_exception(error)
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)


def run_ranks(payload: Mapping[str, Any], launch: Launch, *, logs: Path, grace_s: float) -> int:
    """Start all local ranks as `python -m trainer.run --worker FILE`; return the exit code.

    Args:
        payload: what the ranks need; it travels in a file, never on a command line.
        launch: how many, and how often to restart.
        logs: directory for the output of the ranks other than 0.
        grace_s: seconds that ranks have to save after a signal before they are killed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    logging.getLogger("torch.multiprocessing").setLevel(logging.CRITICAL)
    count = ranks_on_this_node(launch)
    with tempfile.TemporaryDirectory(prefix="perdure-") as folder:
        outcome = Path(folder, "outcome")
        worker_file = Path(folder, "worker.json")
        worker_file.write_text(json.dumps(payload))
        os.environ[_OUTCOME] = str(outcome)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # each rank sets its own number later
        logs.mkdir(parents=True, exist_ok=True)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id="local",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=launch.max_restarts,
            monitor_interval=0.1,
            signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
            shutdown_timeout=int(grace_s) + 1,
            logs_specs=DefaultLogsSpecs(
                log_dir=str(logs), redirects=dict.fromkeys(range(1, count), Std.ALL)
            ),
        )
        try:
            elastic_launch(config, sys.executable)(
                "-m", "trainer.run", "--worker", str(worker_file)
            )
        except ChildFailedError as error:
            print(_failure_text(error, logs), file=sys.stderr, flush=True)
            return _read_outcome(outcome, FAILURE) or FAILURE
        except SignalException:
            return _read_outcome(outcome, RUN_AGAIN)  # stopped before it had begun
        return _read_outcome(outcome, FAILURE)


def _read_outcome(path: Path, default: int) -> int:
    return int(path.read_text()) if path.exists() else default


def _failure_text(error: Any, logs: Path) -> str:
    """Return the first failing rank's traceback, or how it died."""
    rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return (
            f"rank {rank} (process {failure.pid}) was killed by {name}; the other ranks were "
            "stopped. If nobody sent it, the machine may have run out of memory. The same command "
            "goes on from the last checkpoint."
        )
    message = failure.message
    if isinstance(message, Mapping):
        text = message.get("extraInfo", {}).get("py_callstack") or message.get("message")
        return f"rank {rank} failed; the other ranks were stopped:\n{text}"
    return f"rank {rank} failed with exit code {failure.exitcode}; its output is below {logs}"
