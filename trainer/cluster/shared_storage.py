"""Check that several nodes share the storage of a run."""

import secrets
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from trainer.cluster.world import World
from trainer.errors import ConfigError
from trainer.storage import Store

_CACHE_S = 5.0
"""Seconds for which a network file system may still report a new file as missing."""


def is_shared(stores: Sequence[Store], world: World) -> bool:
    """Return whether all ranks see the same run_dir. Collective.

    Args:
        stores: the run's store and, if any, its mirror. With a mirror, run_dir may be node-local.
        world: the ranks; on one machine nothing is checked.

    Raises:
        ConfigError: a rank does not see the last of the stores, which all ranks need.
    """
    if world.size == world.local_size:
        return True
    key, host = world.run_on_rank0(lambda: _create_keys(stores))
    try:
        visible = world.gather_results(lambda: [_is_visible(store, key) for store in stores])
    finally:  # an error of `gather_results` is raised on every rank
        world.run_on_rank0(lambda: _delete_keys(stores, key))
    world.run_on_rank0(partial(_check_visible, stores, host, [rank[-1] for rank in visible]))
    return all(rank[0] for rank in visible)


def _create_keys(stores: Sequence[Store]) -> tuple[str, str]:
    key = f".tmp-seen-{secrets.token_hex(4)}"
    for store in stores:
        store.create(key, b"")
    return key, socket.gethostname()


def _is_visible(store: Store, key: str) -> bool:
    until = time.monotonic() + _CACHE_S
    while True:
        with suppress(FileNotFoundError):
            store.read(key)
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def _delete_keys(stores: Sequence[Store], key: str) -> None:
    for store in stores:
        store.delete([key])


def _check_visible(stores: Sequence[Store], host: str, visible: Sequence[bool]) -> None:
    """Raise ConfigError if some rank does not see the last store."""
    if all(visible):
        return
    setting, alternative = "checkpoint.mirror", ""
    if len(stores) == 1:
        setting = "run_dir"
        alternative = (
            ", or keep a node-local run_dir with a mirror (checkpoint.mirror=s3://bucket/name)"
        )
    raise ConfigError(
        f"{setting}={stores[-1].url} on rank {visible.index(False)} is not the storage that rank 0 "
        f"on {host} writes to, but all nodes need the same. Set a path on a file system that all "
        f"nodes share, or an object store ({setting}=s3://bucket/name){alternative}"
    )
