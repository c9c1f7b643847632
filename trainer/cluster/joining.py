"""The meeting of all ranks at rank 0's store, and the report about ranks that do not come."""

import os
import socket
import sys
import time
from collections.abc import Collection
from datetime import timedelta

from torch.distributed import (  # type: ignore[attr-defined]
    DistNetworkError,
    DistStoreError,
    TCPStore,
)

from trainer.errors import ConfigError, PeerLostError, print_warning

_WARN_S = 30.0
"""Seconds until rank 0 names the missing ranks."""
_ALONE_S = 45.0
"""Seconds until a task of an interactive shell stops waiting for the other tasks."""
_POLL_S = 0.1
_LONGEST_POLL_S = 1.0
"""Longest pause of a rank between two looks at rank 0's decision, seconds."""
_COMPLETE = "complete"
_MAX_LISTED = 8


def meet(rank: int, size: int, *, timeout_s: float) -> TCPStore:
    """Connect to the store at MASTER_ADDR:MASTER_PORT and wait for all ranks. Collective.

    Rank 0 creates the store, except under an elastic agent that has one.

    Raises:
        ConfigError: the other tasks of an interactive shell do not run the command, or the port is
            in use.
        PeerLostError: ranks did not join in time.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = rank == 0 and not has_agent
    # The agent's store has the keys of earlier restarts; agents count restarts differently.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if has_agent else "0"
    prefix = f"join/{restart}/{size}"
    try:
        store = TCPStore(
            host, port, size, is_master, timedelta(seconds=timeout_s), wait_for_workers=False
        )
    except (DistNetworkError, DistStoreError) as error:
        reason = str(error).partition("\n")[0]
        if is_master:
            raise ConfigError(f"cannot listen on MASTER_PORT={port}: {reason}") from None
        raise PeerLostError(f"rank 0 does not answer at {host}:{port}: {reason}") from None
    store.set(f"{prefix}/{rank}", socket.gethostname())
    try:
        _await_all(store, prefix, size, timeout_s) if rank == 0 else _await_verdict(store, prefix)
    except DistNetworkError as error:
        raise PeerLostError(f"rank 0 was lost while ranks joined: {error}") from None
    return store


def _await_all(store: TCPStore, prefix: str, size: int, timeout_s: float) -> None:
    """Wait for all ranks on rank 0; publish the result, and raise if some are missing."""
    began_s, is_warned = time.monotonic(), False
    missing = set(range(1, size))
    while missing := {rank for rank in missing if not store.check([f"{prefix}/{rank}"])}:
        waited_s = time.monotonic() - began_s
        is_alone = len(missing) == size - 1 and _is_interactive()
        limit_s = min(_ALONE_S, timeout_s) if is_alone else timeout_s
        text = f"{size - len(missing)} of {size} ranks started; missing: {_listed(missing)}."
        if waited_s >= limit_s:
            store.set(f"{prefix}/verdict", text)
            time.sleep(2 * _LONGEST_POLL_S)  # the store is in this process: let all ranks read it
            if is_alone:
                raise ConfigError(f"{text} {_shell_advice(size)}")
            raise PeerLostError(f"{text} They did not start within {timeout_s:.0f} s")
        if waited_s >= _WARN_S and not is_warned:
            is_warned = True
            print_warning(f"{text} Waiting up to {limit_s:.0f} s.")
        time.sleep(_POLL_S)
    store.set(f"{prefix}/verdict", _COMPLETE)


def _await_verdict(store: TCPStore, prefix: str) -> None:
    """Wait for rank 0's result; raise if ranks are missing."""
    pause_s = _POLL_S
    while not store.check([f"{prefix}/verdict"]):
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_POLL_S)
    verdict = store.get(f"{prefix}/verdict").decode()
    if verdict != _COMPLETE:
        raise PeerLostError(verdict)


def _is_interactive() -> bool:
    """Return whether this task is probably the only one of its srun that runs the command."""
    is_task = os.environ.get("SLURM_PROCID") == os.environ.get("RANK", "")
    if not is_task or "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    has_local_peers = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
    has_terminal = "SLURM_PTY_PORT" in os.environ or (sys.stdin is not None and sys.stdin.isatty())
    return has_local_peers or has_terminal


def _shell_advice(size: int) -> str:
    return (
        f"This is one of {size} tasks of srun (SLURM_NTASKS={size}), and no other task runs the "
        "command, as in an interactive shell. Start it with launch.nproc=N, which trains on N "
        "local ranks (1: this process alone), or start all tasks: srun python -m trainer.run …"
    )


def _listed(ranks: Collection[int]) -> str:
    names = ", ".join(str(rank) for rank in sorted(ranks)[:_MAX_LISTED])
    return f"rank{'s' * (len(ranks) > 1)} {names}{', …' * (len(ranks) > _MAX_LISTED)}"
