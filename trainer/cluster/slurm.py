"""SLURM job steps: ranks from srun tasks, job metadata, end time and grace time."""

import os
import re
import subprocess
from typing import Any

from trainer.cluster.launch import is_rank
from trainer.errors import ConfigError

_END_TIME = "PERDURE_END_TIME"
"""End of the job in seconds since 1970; set by the batch script."""
_GRACE_S = "PERDURE_GRACE_S"
"""Seconds between the scheduler's signal and SIGKILL; set by the batch script."""
_DEFAULT_GRACE_S = 30.0
_FIRST_PORT, _PORTS = 10_240, 22_528  # below Linux's range for outgoing connections
_STEP_STRIDE = 2003
"""Jobs that are submitted later than a job, until one has the port of its second step."""
_METADATA = {
    "job": "SLURM_JOB_ID",
    "array_job": "SLURM_ARRAY_JOB_ID",
    "array_task": "SLURM_ARRAY_TASK_ID",
    "restart": "SLURM_RESTART_COUNT",
    "elastic_restart": "TORCHELASTIC_RESTART_COUNT",
}


def set_rank_variables(nproc: str = "auto") -> None:
    """Set the environment variables that torchrun sets, if srun started several tasks.

    Only inside a job step: the shell of a batch script has the same SLURM variables and would look
    like rank 0.

    Args:
        nproc: `launch.nproc`. A number means that this task alone starts that many ranks, as in an
            interactive shell.

    Raises:
        ConfigError: nodes have different numbers of tasks, or several tasks have a number of ranks.
    """
    environ = os.environ
    if is_rank() or "SLURM_STEP_ID" not in environ or int(environ.get("SLURM_NTASKS", "1")) == 1:
        return
    if nproc != "auto":
        if environ["SLURM_PROCID"] != "0":
            raise ConfigError(
                f"launch.nproc={nproc} starts its own ranks, but srun started "
                f"{environ['SLURM_NTASKS']} tasks, each with this command: leave launch.nproc out, "
                "or start one task (--ntasks=1)"
            )
        return
    layout = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    if not re.fullmatch(r"(\d+)(\(x\d+\))?", layout):
        raise ConfigError(
            f"srun started {layout} tasks on the nodes, but every node needs the same number: use "
            "--ntasks-per-node instead of --ntasks"
        )
    job, restarts = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_RESTART_COUNT", "0"))
    step = int(environ["SLURM_STEP_ID"])  # several steps of a job may run at once
    # Jobs on one node get different ports.
    port = _FIRST_PORT + (4 * (job + _STEP_STRIDE * step) + restarts % 4) % _PORTS
    environ.update(
        RANK=environ["SLURM_PROCID"],
        WORLD_SIZE=environ["SLURM_NTASKS"],
        LOCAL_RANK=environ["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=layout.partition("(")[0],
    )
    if "MASTER_ADDR" not in environ:
        nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
        environ["MASTER_ADDR"] = _first_host(nodes)
    environ.setdefault("MASTER_PORT", str(port))


def _first_host(nodes: str) -> str:
    """Return the first host of a node list such as `n[1-2],gpu-[07,09]`, expanded by scontrol."""
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        hosts = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"scontrol show hostnames {nodes} failed ({error}); set MASTER_ADDR to the first node"
        ) from None
    return hosts.stdout.split()[0]


def job_metadata() -> dict[str, Any]:
    """Return the ids that the scheduler or elastic agent gave this start, for its record."""
    return {key: os.environ[name] for key, name in _METADATA.items() if name in os.environ}


def end_time_s() -> float | None:
    """Return the end of the job in seconds since 1970; None if the batch script did not set it."""
    text = os.environ.get(_END_TIME, "")
    return float(text) if text else None


def grace_s(configured: float | None) -> float:
    """Return the seconds between a signal and SIGKILL: configured, from the batch script, or 30."""
    return configured or float(os.environ.get(_GRACE_S) or _DEFAULT_GRACE_S)
