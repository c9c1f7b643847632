"""Start of the ranks of this node, through torch's elastic launch."""

import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.cluster import outcome
from trainer.cluster.early_stop import numbers, restored_handlers, watch_arrivals
from trainer.config.schema import Launch
from trainer.core.scratch import scratch_folder
from trainer.errors import FAILURE, RUN_AGAIN

_MAX_THREADS = 16
_CRASHES = (
    signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGSYS,
)  # fmt: skip
"""Signals that a process's own native code causes."""
_HANDLED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


def is_rank() -> bool:
    """Return whether a launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def ranks_on_this_node(launch: Launch) -> int:
    """Return the number of ranks to start here: `launch.nproc`, or the number of GPUs, else 1."""
    if launch.nproc != "auto":
        return int(launch.nproc)
    if launch.device == "cpu":
        return 1
    import torch

    return max(torch.cuda.device_count(), 1)


def world_size(launch: Launch) -> int:
    """Return the number of ranks of the run."""
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
    """Return the CPU threads of this rank: as configured, as `stored`, or its share of the CPUs.

    Args:
        launch: `threads` is a number or `auto`.
        stored: the number of the first attempt; None for the first attempt itself.
    """
    if launch.threads != "auto":
        return int(launch.threads)
    if stored is not None:
        return stored
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(len(os.sched_getaffinity(0)) // local_size, _MAX_THREADS))


def run_ranks(payload: Mapping[str, Any], launch: Launch, *, logs: Path, grace_s: float) -> int:
    """Start all local ranks as `python -m perdure run --worker FILE`; return the exit code.

    Args:
        payload: input of the ranks; passed in a file, never on a command line.
        launch: number of ranks and of restarts.
        logs: directory for the output of all ranks but rank 0.
        grace_s: seconds between a signal and SIGKILL, for the ranks to save.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    from trainer.cluster import stop

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    logging.getLogger("torch.multiprocessing").setLevel(logging.CRITICAL)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # a new store for each restart
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each rank sets its own number later
    logs.mkdir(parents=True, exist_ok=True)
    with scratch_folder("ranks") as folder:
        outcome_file, worker_file = folder / "outcome", folder / "worker.json"
        worker_file.write_text(json.dumps(payload))
        start = elastic_launch(_elastic_config(launch, logs, grace_s), sys.executable)
        end_watching = watch_arrivals(stop.SecondInterrupt())
        try:
            with outcome.file_for_ranks(outcome_file), restored_handlers():
                start("-m", "perdure", "run", "--worker", str(worker_file))
            return outcome.read(outcome_file, FAILURE)
        except ChildFailedError as error:
            return _report_failure(error, outcome.read(outcome_file, FAILURE) or FAILURE, logs)
        except SignalException:  # a signal before the ranks had started
            return outcome.read(outcome_file, RUN_AGAIN)
        finally:
            end_watching()


def _elastic_config(launch: Launch, logs: Path, grace_s: float) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    count = ranks_on_this_node(launch)
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="local",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=launch.max_restarts,
        monitor_interval=0.1,
        signals_to_handle=",".join(signal.Signals(n).name for n in numbers(_HANDLED)),
        shutdown_timeout=int(grace_s) + 1,
        logs_specs=DefaultLogsSpecs(
            log_dir=str(logs), redirects=dict.fromkeys(range(1, count), Std.ALL)
        ),
    )


def _report_failure(error: Any, code: int, logs: Path) -> int:
    """Print how the first rank failed, unless it has printed that itself; return the exit code.

    Args:
        error: torch's ChildFailedError.
        code: the code in the outcome file, or `FAILURE`.
        logs: directory with the output of the other ranks.
    """
    rank, failure = _first_failure(error)
    has_message = isinstance(failure.message, Mapping)
    if failure.exitcode < 0 and not has_message:
        code = FAILURE if -failure.exitcode in _CRASHES else RUN_AGAIN
    elif code == RUN_AGAIN and not has_message:
        return code
    print(_failure_text(rank, failure, logs), file=sys.stderr, flush=True)
    if has_message and code == RUN_AGAIN:
        print(outcome.RESUME_HINT, file=sys.stderr, flush=True)
    return code


def _first_failure(error: Any) -> tuple[int, Any]:
    """Return the first rank that failed with a message; else the first killed; else the first."""
    failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    with_message = [item for item in failures if isinstance(item[1].message, Mapping)]
    killed = [item for item in failures if item[1].exitcode < 0]
    first: tuple[int, Any] = (with_message or killed or failures)[0]
    return first


def _failure_text(rank: int, failure: Any, logs: Path) -> str:
    message = failure.message
    if isinstance(message, Mapping):
        text = message.get("extraInfo", {}).get("py_callstack") or message.get("message")
        return f"rank {rank} failed; the other ranks were stopped:\n{text}"
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        if -failure.exitcode in _CRASHES:
            return (
                f"rank {rank} (process {failure.pid}) crashed with {name}; the other ranks were "
                "stopped. Native code, such as a library or a collective, ended the process and "
                f"would do so again; see the last lines above or in {logs}"
            )
        return (
            f"rank {rank} (process {failure.pid}) was killed by {name}; the other ranks were "
            "stopped. If you did not send the signal, the machine may have run out of memory. "
            f"{outcome.RESUME_HINT}"
        )
    return f"rank {rank} failed with exit code {failure.exitcode}; see its output in {logs}"
