"""Attempts of one run that save, resume from a step, and commit too late."""

from collections.abc import Iterable

import torch

from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import Attempt, Commit
from trainer.checkpoint.state_tree import Content
from trainer.checkpoint.writer import Writer
from trainer.cluster.world import World
from trainer.storage import LocalStore, Store


def start(store: Store, step: int = 0) -> Attempt:
    """Begin an attempt that resumes from `step`."""
    attempt = lineage.begin(store, {})
    lineage.amend(store, attempt, {"resumed_from": {"step": step}})
    return attempt


def save(store: Store, attempt: Attempt, step: int) -> Commit:
    content = Content(tensors={"w": torch.full((50,), float(step))})
    saved = Writer(store, World(), attempt).start_save(content, step=step).result()
    return Commit(step, attempt.number, f"checkpoints/{saved.folder}")


def commit_late(store: Store, attempt: Attempt, step: int) -> Commit:
    """Commit as a writer that checked for newer attempts just before one started."""
    behind = LocalStore(store.url)
    behind.list = lambda prefix: (  # type: ignore[method-assign]
        [f"attempts/{attempt.number:04d}.json"] if prefix == "attempts" else store.list(prefix)
    )
    return save(behind, attempt, step)


def step_of(commits: Iterable[Commit]) -> list[tuple[int, int]]:
    return [(commit.step, commit.attempt) for commit in commits]


def surviving(store: Store) -> list[tuple[int, int]]:
    return step_of(lineage.commits(store))
