"""Ranks, process groups, and collectives that carry results and errors."""

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from trainer.cluster import joining
from trainer.errors import PerdureError

T = TypeVar("T")

_BACKGROUND_TIMEOUT = timedelta(days=1)
"""Timeout of the groups of background threads, whose checkpoint writes may take long."""


@dataclass(frozen=True)
class World:
    """This rank, the world size, and the CPU process groups."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Number of ranks on this machine."""
    device: torch.device = torch.device("cpu")
    control: Any = None
    """Gloo group of the main threads; never used for gradients."""
    background: Any = None
    """Gloo group of the background threads that save."""

    def run_on_rank0(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0; return its result, or raise its error, on every rank.

        Collective.
        """
        if self.size == 1:
            return function()
        outcome: list[Any] = [None]
        if self.rank == 0:
            outcome = [_attempt(function)]
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        value, error = outcome[0]
        if error is not None:
            raise _agreed(error)
        return value  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """Return every rank's `value`, in rank order, on every rank. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_on_rank0(self, value: T) -> list[T]:
        """Return every rank's `value`, in rank order, on rank 0; elsewhere []. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values or []

    def run_on_all(self, function: Callable[[], T]) -> T:
        """Call `function` on every rank; return this rank's result, or raise the first error.

        Collective. `function` must not communicate, unless it does so equally on every rank.
        The error of the lowest failed rank is raised on every rank, with its type, and with its
        rank unless all ranks failed alike.
        """
        if self.size == 1:
            return function()
        outcome = _attempt(function)
        errors = self.gather(outcome[1])
        are_alike = len({(type(error), str(error)) for error in errors}) == 1
        for rank, error in enumerate(errors):
            if error is not None:
                raise _agreed(error, "" if are_alike else f"rank {rank}: ")
        return outcome[0]  # type: ignore[no-any-return]

    def gather_results(self, function: Callable[[], T]) -> list[T]:
        """Call `function` as `run_on_all` does; return all ranks' results in rank order."""
        return self.gather(self.run_on_all(function))

    def all(self, value: bool) -> bool:
        """Return whether `value` is true on every rank. Collective."""
        if self.size == 1:
            return value
        votes = torch.tensor(int(value))
        dist.all_reduce(votes, dist.ReduceOp.MIN, group=self.control)
        return bool(votes)

    def for_background_thread(self) -> "World":
        """Return the same ranks for a background thread: its collectives use `background`."""
        return replace(self, control=self.background)

    def with_own_group(self) -> "World":
        """Return the same ranks with a new process group, for one more thread.

        Collective, on the main thread.
        """
        if self.size == 1:
            return self
        return replace(self, control=dist.new_group(backend="gloo", timeout=_BACKGROUND_TIMEOUT))

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean of `values` over all ranks, on the training group. Collective."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def close(self) -> None:
        """Destroy the process groups after a barrier. Collective."""
        if self.size > 1:
            with suppress(RuntimeError):  # a rank that has exited needs no barrier
                dist.barrier(group=self.control)
            dist.destroy_process_group()


def _attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except PerdureError as error:
        return None, error
    except Exception as error:  # must reach the collective that follows
        text = "".join(traceback.format_exception(error)).rstrip()
        return None, RuntimeError(text)  # picklable


def _agreed(error: Exception, prefix: str = "") -> Exception:
    """Return the error for every rank to raise, with `agreed` set: all ranks raise it."""
    raised = type(error)(f"{'' if hasattr(error, 'agreed') else prefix}{error}")
    raised.agreed = True  # type: ignore[attr-defined]
    return raised


def connect(device: torch.device, *, timeout_s: float) -> World:
    """Join the process groups that the environment variables describe. Collective.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them. Without
    WORLD_SIZE, or with one rank, no process group is created.

    Raises:
        ConfigError, PeerLostError: ranks are missing, see `joining.meet`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(device=device)
    timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    rank = int(os.environ["RANK"])
    store: Any = joining.meet(rank, size, timeout_s=timeout_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The agent's store outlives its ranks and has stale addresses: use a new prefix.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"perdure/{restart}/{size}", store)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    control = dist.new_group(backend="gloo", timeout=timeout)
    background = dist.new_group(backend="gloo", timeout=_BACKGROUND_TIMEOUT)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return World(dist.get_rank(), size, local_rank, local_size, device, control, background)
