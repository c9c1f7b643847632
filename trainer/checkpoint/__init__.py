"""Atomic checkpoints: save, load, latest, steps, verify, delete.

A checkpoint exists if and only if its manifest exists and matches the files it names. Every byte
that is loaded is verified, and no pickle is ever read.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import Attempt, Commit
from trainer.checkpoint.manifest import Manifest
from trainer.storage.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.checkpoint.reader import Reader
    from trainer.checkpoint.shard_reader import DamagedError
    from trainer.checkpoint.state_tree import Content
    from trainer.checkpoint.writer import PendingSave, Writer

__all__ = [
    "Attempt", "Commit", "Content", "DamagedError", "Manifest", "PendingSave", "Reader", "Writer",
    "delete", "latest", "load", "save", "steps", "verify",
]  # fmt: skip
_MODULES = {
    "Content": "state_tree", "DamagedError": "shard_reader", "PendingSave": "writer",
    "Reader": "reader", "Writer": "writer",
}  # fmt: skip
"""Modules of the names that are imported when they are used: they import torch."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def save(
    writer: "Writer",
    content: "Content",
    *,
    step: int,
    epoch: int = 0,
    samples: int = 0,
    config: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write and commit a checkpoint of `step`. Collective; durable and visible on return.

    `Writer.start_save` does the same in the background. Every rank gets the same manifest.

    Raises:
        CheckpointError, StoreError: on every rank; nothing was committed.
        SupersededError: a newer attempt owns the run.
    """
    pending = writer.start_save(
        content, step=step, epoch=epoch, samples=samples, config=config, is_blocking=True
    )
    return pending.result()


def steps(store: Store) -> list[Commit]:
    """Return the committed checkpoints of the surviving timeline, oldest first. Any rank."""
    return lineage.commits(store)


def latest(store: Store) -> Manifest | None:
    """Return the newest manifest of the surviving timeline, or None. Any rank.

    `load` and `verify` check whether its shards are intact.
    """
    commits = steps(store)
    return lineage.read_manifest(store, commits[-1]) if commits else None


def load(
    store: Store, manifest_: Manifest, targets: "Mapping[str, Tensor]", *, peers: int = 1
) -> None:
    """Read stored tensors into the tensors of `targets`, in place, by name. No collectives.

    Args:
        store: the run's store.
        manifest_: the checkpoint.
        targets: tensors to fill, by stored name.
        peers: number of processes on this machine that load the same checkpoint at the same time.
            Data that several of them need is then read from the disk once.

    Raises:
        CheckpointError: a name, shape or dtype differs.
        DamagedError: bytes failed verification; `targets` may be partly overwritten.
    """
    from trainer.checkpoint.reader import Reader

    folder = f"{lineage.FOLDER}/{manifest_.folder}"
    Reader(store, folder, manifest_, peers=peers).read(targets)


def verify(store: Store, manifest_: Manifest) -> None:
    """Read and verify every byte of a checkpoint. Any rank.

    Raises:
        DamagedError: the first mismatch, with file and tensor.
    """
    from trainer.checkpoint.reader import Reader

    Reader(store, f"{lineage.FOLDER}/{manifest_.folder}", manifest_).verify()


def delete(store: Store, commit: Commit) -> None:
    """Delete a checkpoint, starting with its manifest. Rank 0 only."""
    lineage.delete(store, commit.folder)
