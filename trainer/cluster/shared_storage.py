"""Whether several nodes have one place for a run."""

import secrets
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from trainer.cluster.world import World
from trainer.errors import ConfigError
from trainer.storage import Store

_SHARED_S = 5.0
"""Network file systems remember for a while that something was not there."""


def find_shared(stores: Sequence[Store], world: World) -> bool:
    """Return whether all ranks see one run_dir; refuse what they must have in common. Collective.

    Args:
        stores: the run's own and, if it has one, its mirror: with it each node may have a run_dir
            of its own.
        world: the ranks; those of one machine are not asked.

    Raises:
        ConfigError: a rank does not see the place that all of them need.
    """
    if world.size == world.local_size:
        return True
    key, host = world.run_on_rank0(lambda: _leave_keys(stores))
    try:
        sees = world.gather_results(lambda: [_sees(store, key) for store in stores])
    finally:  # an error of `gather_results` is every rank's
        world.run_on_rank0(lambda: _take_keys(stores, key))
    world.run_on_rank0(partial(_refuse_blind, stores, host, [seen[-1] for seen in sees]))
    return all(seen[0] for seen in sees)


def _leave_keys(stores: Sequence[Store]) -> tuple[str, str]:
    key = f".tmp-seen-{secrets.token_hex(4)}"
    for store in stores:
        store.create(key, b"")
    return key, socket.gethostname()


def _sees(store: Store, key: str) -> bool:
    until = time.monotonic() + _SHARED_S
    while True:
        with suppress(FileNotFoundError):
            store.read(key)
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def _take_keys(stores: Sequence[Store], key: str) -> None:
    for store in stores:
        store.delete([key])


def _refuse_blind(stores: Sequence[Store], host: str, sees: Sequence[bool]) -> None:
    """Refuse ranks that do not see the place that all of them need."""
    if all(sees):
        return
    where, ways = "checkpoint.mirror", ""
    if len(stores) == 1:
        where = "run_dir"
        ways = (
            ", or keep a run_dir of its own on each with a mirror "
            "(checkpoint.mirror=s3://bucket/name)"
        )
    raise ConfigError(
        f"{where}={stores[-1].url} of rank {sees.index(False)} is not the place that rank 0 "
        f"on {host} writes to: nodes need one place for a run. Give a path on a file system that "
        f"all nodes share, or an object store ({where}=s3://bucket/name){ways}"
    )
