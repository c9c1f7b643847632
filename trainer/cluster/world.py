"""Rank facts, the CPU control group, and agreement between ranks."""

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from trainer.errors import PerdureError

T = TypeVar("T")


_PATIENCE = timedelta(days=1)
"""Of groups that threads use which write checkpoints: these may take long."""


@dataclass(frozen=True)
class World:
    """Who we are among the ranks."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """How many of the ranks are on this machine."""
    device: torch.device = torch.device("cpu")
    control: Any = None
    """A gloo group for agreements of the main threads; training never uses it."""
    background: Any = None
    """A gloo group for agreements of threads that work beside them; nothing else uses it."""

    def run_on_rank0(self, ask: Callable[[], T]) -> T:
        """Call `ask` on rank 0; return its answer or raise its error on every rank. Collective."""
        if self.size == 1:
            return ask()
        outcome: list[Any] = [None]
        if self.rank == 0:
            outcome = [_attempt(ask)]
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

    def run_on_all(self, do: Callable[[], T]) -> T:
        """Call `do` on every rank and return its own answer, or raise the first rank's error.

        Collective; `do` itself must not communicate, or only if it does so on every rank alike.
        The error names its rank and has the same type on every rank.
        """
        if self.size == 1:
            return do()
        outcome = _attempt(do)
        for rank, error in enumerate(self.gather(outcome[1])):
            if error is not None:
                raise _agreed(error, f"rank {rank}: ")
        return outcome[0]  # type: ignore[no-any-return]

    def gather_results(self, do: Callable[[], T]) -> list[T]:
        """As `run_on_all`, but return every rank's answer, in rank order."""
        return self.gather(self.run_on_all(do))

    def all(self, value: bool) -> bool:
        """Return whether `value` is true on every rank. Collective."""
        if self.size == 1:
            return value
        votes = torch.tensor(int(value))
        dist.all_reduce(votes, dist.ReduceOp.MIN, group=self.control)
        return bool(votes)

    def for_background_thread(self) -> "World":
        """Return the same ranks for a thread beside the main one: it agrees on `background`."""
        return replace(self, control=self.background)

    def with_own_group(self) -> "World":
        """Return the same ranks for one more thread, with a group of its own.

        Collective, on the main thread.
        """
        if self.size == 1:
            return self
        return replace(self, control=dist.new_group(backend="gloo", timeout=_PATIENCE))

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean of `values` over all ranks, on the training group. Collective."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def close(self) -> None:
        """Leave the process groups when all other ranks do so too."""
        if self.size > 1:
            with suppress(RuntimeError):  # who is gone already has all that it needs
                dist.barrier(group=self.control)
            dist.destroy_process_group()


def _attempt(do: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return do(), None
    except PerdureError as error:
        return None, error
    except Exception as error:  # every exception between two votes becomes a vote
        text = "".join(traceback.format_exception(error)).rstrip()
        return None, RuntimeError(text)  # plain, so that it can cross ranks


def _agreed(error: Exception, prefix: str = "") -> Exception:
    """Return the error as every rank raises it; `agreed` tells that all of them do."""
    raised = type(error)(f"{'' if hasattr(error, 'agreed') else prefix}{error}")
    raised.agreed = True  # type: ignore[attr-defined]
    return raised


def connect(device: torch.device, *, timeout_s: float) -> World:
    """Join the process groups that the environment describes. Collective over all ranks.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them. Without
    WORLD_SIZE, or with one rank, there is no group at all.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(device=device)
    timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, rank, _ = next(iter(rendezvous("env://", timeout=timeout)))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # It outlives its ranks, with the addresses of those who are dead; a new one is nobody's.
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
    background = dist.new_group(backend="gloo", timeout=_PATIENCE)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return World(dist.get_rank(), size, local_rank, local_size, device, control, background)
