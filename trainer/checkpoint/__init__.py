"""Checkpoints that either exist whole or do not exist: save, load, latest, steps, verify, delete.

A checkpoint exists if and only if its manifest exists and agrees with the files it names. Nothing
is trusted: every byte that is loaded is checked, and no pickle is ever read.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import Attempt, Commit
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import DamagedError, Reader
from trainer.checkpoint.state_tree import Content
from trainer.checkpoint.writer import PendingSave, Writer
from trainer.storage.store import Store

__all__ = [
    "Attempt", "Commit", "Content", "DamagedError", "Manifest", "PendingSave", "Reader", "Writer",
    "delete", "latest", "load", "save", "steps", "verify",
]  # fmt: skip


def save(
    writer: Writer,
    content: Content,
    *,
    step: int,
    epoch: int = 0,
    samples: int = 0,
    config: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write and commit a checkpoint of `step`. Collective; durable and visible on return.

    `Writer.start_save` does the same beside the training. Every rank gets the same manifest.

    Raises:
        CheckpointError, StoreError: on every rank; nothing was committed.
        SupersededError: a newer attempt owns the run.
    """
    begun = writer.start_save(
        content, step=step, epoch=epoch, samples=samples, config=config, is_blocking=True
    )
    return begun.result()


def steps(store: Store) -> list[Commit]:
    """Return the committed checkpoints of the surviving timeline, oldest first. Any rank."""
    return lineage.commits(store)


def latest(store: Store) -> Manifest | None:
    """Return the newest manifest of the surviving timeline, or None. Any rank.

    Whether its shards are whole is found by `load` or `verify`.
    """
    found = steps(store)
    return lineage.read_manifest(store, found[-1]) if found else None


def load(
    store: Store, manifest_: Manifest, targets: Mapping[str, Tensor], *, peers: int = 1
) -> None:
    """Read stored tensors into the tensors of `targets`, in place, by name. No collectives.

    Where several processes of a machine load the same checkpoint at the same time, `peers` says
    how many: what several need is then read from the disk once.

    Raises:
        CheckpointError: a name, shape or dtype does not fit.
        DamagedError: bytes are proven wrong; `targets` may be partly overwritten.
    """
    folder = f"{lineage.FOLDER}/{manifest_.folder}"
    Reader(store, folder, manifest_, peers=peers).read(targets)


def verify(store: Store, manifest_: Manifest) -> None:
    """Read every byte of a checkpoint and check it. Any rank.

    Raises:
        DamagedError: names the file and the tensor.
    """
    Reader(store, f"{lineage.FOLDER}/{manifest_.folder}", manifest_).verify()


def delete(store: Store, commit: Commit) -> None:
    """Delete a checkpoint, its manifest first. Rank 0 only."""
    lineage.delete(store, commit.folder)
