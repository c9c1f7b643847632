"""How ranks come to be: one process, all local ranks through torch's elastic launch, torchrun."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from trainer.config.schema import Launch
from trainer.core.atomic_file import atomic_file
from trainer.errors import DONE, FAILURE, RUN_AGAIN, ConfigError, PerdureError

_OUTCOME = "PERDURE_OUTCOME"
"""Names the file in which rank 0 leaves the exit code for whoever started it all."""
_END_TIME = "PERDURE_END_TIME"
"""When the scheduler ends the job, in seconds since 1970; the batch script sets it."""
_GRACE_S = "PERDURE_GRACE_S"
"""Seconds between the scheduler's signal and SIGKILL; the batch script sets it."""
_GRACE_DEFAULT_S = 30.0
_FIRST_PORT, _PORTS = 10_240, 22_528  # up to where Linux takes ports for outgoing connections
_MAX_THREADS = 16


def is_rank() -> bool:
    """Return whether a launcher has started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


# --- SLURM's tasks as ranks ----------------------------------------------------------------------


def take_rank_from_slurm() -> None:
    """Set the variables that torchrun would set, where srun has started several tasks of us.

    The variables of srun are believed inside of a step only: the shell of a batch script has them
    too, and looks like rank 0 of all.

    Raises:
        ConfigError: nodes have different numbers of tasks.
    """
    environ = os.environ
    if is_rank() or "SLURM_STEP_ID" not in environ or int(environ.get("SLURM_NTASKS", "1")) == 1:
        return
    layout = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    if not re.fullmatch(r"(\d+)(\(x\d+\))?", layout):
        raise ConfigError(
            f"srun has started {layout} tasks on the nodes; every node needs the same number: use "
            "--ntasks-per-node instead of --ntasks"
        )
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
    job, restarts = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_RESTART_COUNT", "0"))
    port = _FIRST_PORT + (4 * job + restarts % 4) % _PORTS  # of one node's jobs, each its own
    environ.update(
        RANK=environ["SLURM_PROCID"],
        WORLD_SIZE=environ["SLURM_NTASKS"],
        LOCAL_RANK=environ["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=layout.partition("(")[0],
    )
    if "MASTER_ADDR" not in environ:
        environ["MASTER_ADDR"] = _first_host(nodes)
    environ.setdefault("MASTER_PORT", str(port))


def _first_host(nodes: str) -> str:
    """Return the first of `n[1-2],gpu-[07,09]`; scontrol, on every node, knows all forms."""
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"scontrol show hostnames {nodes} failed ({error}); set MASTER_ADDR to the first node"
        ) from None
    return shown.stdout.split()[0]


def job_facts() -> dict[str, Any]:
    """Return what a scheduler or an elastic agent calls this start, for the attempt's record."""
    named = {
        "job": "SLURM_JOB_ID",
        "array_job": "SLURM_ARRAY_JOB_ID",
        "array_task": "SLURM_ARRAY_TASK_ID",
        "restart": "SLURM_RESTART_COUNT",
        "elastic_restart": "TORCHELASTIC_RESTART_COUNT",
    }
    return {key: os.environ[name] for key, name in named.items() if name in os.environ}


def end_time_s() -> float | None:
    """Return when the scheduler ends the job, in seconds since 1970, if the batch script knows."""
    text = os.environ.get(_END_TIME, "")
    return float(text) if text else None


def grace_s(wanted: float | None) -> float:
    """Return the seconds between a signal and SIGKILL: as set, else the batch script's, else 30."""
    return wanted or float(os.environ.get(_GRACE_S) or _GRACE_DEFAULT_S)


# --- ranks of this node --------------------------------------------------------------------------


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


def leave_outcome(code: int) -> None:
    """Tell whoever started it all how the run ended; exit codes get lost on the way. Rank 0."""
    path = os.environ.get(_OUTCOME)
    if path is not None:
        with atomic_file(Path(path), durable=False) as file:
            file.write(str(code).encode())


def _has_outcome() -> bool:
    return Path(os.environ.get(_OUTCOME, "")).is_file()


def forget_outcome() -> None:
    """Take back what an earlier attempt has left, before this one begins. Rank 0 only."""
    if _OUTCOME in os.environ:
        Path(os.environ[_OUTCOME]).unlink(missing_ok=True)


def rank_exit_code(code: int) -> int:
    """Return with what code a rank exits after an outcome that all ranks agree on.

    Elastic agents take any code but 0 for a crash, kill the other ranks and start again. So under
    an agent it is 0 for a preemption, and for all else where somebody reads the outcome.
    """
    is_read = _OUTCOME in os.environ or code == RUN_AGAIN
    return DONE if is_read and "TORCHELASTIC_RUN_ID" in os.environ else code


def leave_at_once(code: int, text: str = "") -> NoReturn:
    """Say why, leave the outcome, and end the process though other threads may hang. Any rank."""
    if text:
        print(text, file=sys.stderr, flush=True)
    if not _has_outcome():  # who failed knows better why all of them go
        leave_outcome(code)
    sys.stdout.flush()
    os._exit(code)


def report_crash(error: BaseException) -> int:
    """Tell an error of this rank alone, and its exit code, which is returned.

    It is left where the elastic agent finds it, so that it is shown once; else printed.
    """
    told = f"{type(error).__name__}: {error}" if isinstance(error, PerdureError) else ""
    code = error.exit_code if isinstance(error, PerdureError) else FAILURE
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        print(f"rank {os.environ.get('RANK')} failed: {told}", file=sys.stderr, flush=True)
        if not told:
            traceback.print_exception(error)
    elif told:  # what a person can act on; where it came from says no more
        extra = {"py_callstack": told, "timestamp": str(int(time.time()))}
        text = json.dumps({"message": {"message": told, "extraInfo": extra}})
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(text)
    else:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(error)
    if code != RUN_AGAIN or not _has_outcome():
        leave_outcome(code)
    return code


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

    from trainer.cluster import stop

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    logging.getLogger("torch.multiprocessing").setLevel(logging.CRITICAL)
    count = ranks_on_this_node(launch)
    with tempfile.TemporaryDirectory(prefix="perdure-") as folder:
        outcome = Path(folder, "outcome")
        worker_file = Path(folder, "worker.json")
        worker_file.write_text(json.dumps(payload))
        asked_outcome = os.environ.get(_OUTCOME)
        os.environ[_OUTCOME] = str(outcome)
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # a new store for each restart
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
        end_watching = stop.watch_arrivals(stop.SecondInterrupt())
        try:
            elastic_launch(config, sys.executable)(
                "-m", "trainer.run", "--worker", str(worker_file)
            )
            code = _read_outcome(outcome, FAILURE)
        except ChildFailedError as error:
            rank, failure = _first_failure(error)
            told = isinstance(failure.message, Mapping)
            was_killed = failure.exitcode < 0 and not told
            code = RUN_AGAIN if was_killed else _read_outcome(outcome, FAILURE) or FAILURE
            if was_killed or told or code != RUN_AGAIN:
                print(_failure_text(rank, failure, logs), file=sys.stderr, flush=True)
                if told and code == RUN_AGAIN:
                    print("The same command goes on.", file=sys.stderr, flush=True)
        except SignalException:
            code = _read_outcome(outcome, RUN_AGAIN)  # stopped before it had begun
        finally:
            end_watching()
            del os.environ[_OUTCOME]
            if asked_outcome is not None:
                os.environ[_OUTCOME] = asked_outcome
    return code


def _read_outcome(path: Path, default: int) -> int:
    return int(path.read_text()) if path.exists() else default


def _first_failure(error: Any) -> tuple[int, Any]:
    """Return the rank that failed first, and how: what it said counts more than how it ended."""
    failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    told = [item for item in failures if isinstance(item[1].message, Mapping)]
    killed = [item for item in failures if item[1].exitcode < 0]
    first: tuple[int, Any] = (told or killed or failures)[0]
    return first


def _failure_text(rank: int, failure: Any, logs: Path) -> str:
    message = failure.message
    if isinstance(message, Mapping):
        text = message.get("extraInfo", {}).get("py_callstack") or message.get("message")
        return f"rank {rank} failed; the other ranks were stopped:\n{text}"
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return (
            f"rank {rank} (process {failure.pid}) was killed by {name}; the other ranks were "
            "stopped. If nobody sent it, the machine may have run out of memory. The same command "
            "goes on from the last checkpoint."
        )
    return f"rank {rank} failed with exit code {failure.exitcode}; its output is below {logs}"
