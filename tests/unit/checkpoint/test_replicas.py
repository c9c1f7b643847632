"""A run in two stores: merged attempt records and selection of checkpoints."""

from pathlib import Path

import pytest
import torch

from trainer import checkpoint
from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import Attempt, Commit
from trainer.checkpoint.replicas import Replicas
from trainer.checkpoint.state_tree import Content
from trainer.checkpoint.writer import Writer
from trainer.cluster.world import World
from trainer.errors import ConfigError
from trainer.storage import LocalStore
from trainer.storage.store import Fallback


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def replicas_of(folder: Path, node: str = "node1") -> Replicas:
    """Return the stores as a node with a local disk sees them."""
    return Replicas(LocalStore(str(folder / node)), LocalStore(str(folder / "mirror")))


def start(replicas: Replicas, step: int = 0) -> Attempt:
    attempt = replicas.begin({"host": Path(replicas.run.url).name})
    replicas.amend(attempt, {"resumed_from": {"step": step}})
    return attempt


def save(replicas: Replicas, attempt: Attempt, step: int, *, copied: bool = True) -> Commit:
    content = Content(tensors={"w": torch.full((50,), float(step))})
    manifest = checkpoint.save(Writer(replicas.run, World(), attempt), content, step=step)
    if copied and replicas.mirror is not None:
        for key in replicas.run.list(f"checkpoints/{manifest.folder}"):
            replicas.mirror.create(key, replicas.run.read(key))
    return Commit(step, attempt.number, f"checkpoints/{manifest.folder}")


def steps(replicas: Replicas) -> list[tuple[int, int]]:
    return [(commit.step, commit.attempt) for commit in replicas.survey().commits]


def test_begin_numbers_attempts_across_nodes(folder):
    nodes = ["node1", "node2", "node1", "node3"]
    numbers = [start(replicas_of(folder, node)).number for node in nodes]
    assert numbers == [1, 2, 3, 4]


def test_lost_records_are_restored_from_other_store(folder):
    replicas = replicas_of(folder)
    first = start(replicas)
    lineage.amend(replicas.run, first, {"ended": "now", "outcome": "preempted"})
    for store in replicas.stores:
        records = lineage.records(store)
        other = next(candidate for candidate in replicas.stores if candidate is not store)
        assert replicas.records()[0]["outcome"] == "preempted"
        start(replicas, 5)
        assert len(lineage.records(store)) == len(records) + 1
        assert lineage.records(other)[0]["outcome"] == "preempted"
    empty = replicas_of(folder, "node2")
    assert start(empty, 7).number == 4
    assert [r["attempt"] for r in lineage.records(empty.run)] == [1, 2, 3, 4]


def test_mirror_added_later_receives_records(folder):
    alone = Replicas(LocalStore(str(folder / "node1")))
    save(alone, start(alone), 5)
    replicas = replicas_of(folder)
    assert start(replicas, 5).number == 2
    assert [r["attempt"] for r in lineage.records(replicas.mirror)] == [1, 2]


def test_survey_rejects_mirror_of_another_run(folder):
    start(replicas_of(folder))
    other = Replicas(LocalStore(str(folder / "another")))
    start(other)
    mixed = Replicas(other.run, replicas_of(folder).mirror)
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror=.*belongs to another run"):
        mixed.survey()


@pytest.mark.parametrize("lost", ["run", "mirror"])
def test_survey_after_losing_one_store_uses_other(folder, lost):
    replicas = replicas_of(folder)
    attempt = start(replicas)
    for step in (5, 10):
        save(replicas, attempt, step)
    store = getattr(replicas, lost)
    for key in reversed(store.list("")):
        store.delete([key])
    assert steps(replicas) == [(5, 1), (10, 1)]
    assert start(replicas, 10).number == 2
    view = Fallback(replicas.survey().views(replicas.survey().commits[-1])[0])
    assert lineage.read_manifest(view, replicas.survey().commits[-1]).step == 10


def test_lineage_takes_precedence_over_higher_step(folder):
    """A node returns with step 1,400 of a timeline abandoned at step 1,000."""
    node1, node2 = replicas_of(folder), replicas_of(folder, "node2")
    first = start(node1)
    save(node1, first, 1000)
    save(node1, first, 1400, copied=False)
    second = start(node2, 1000)
    save(node2, second, 1100)
    assert steps(node1) == [(1000, 1), (1100, 2)]
    start(node1, 1100)
    assert [c.step for c in lineage.commits(node1.run)] == [
        1000
    ]  # the record has been copied by now


def test_views_prefer_run_store_and_fall_back_to_mirror(folder):
    replicas = replicas_of(folder)
    attempt = start(replicas)
    save(replicas, attempt, 5)
    newest = save(replicas, attempt, 10, copied=False)
    survey = replicas.survey()
    assert survey.views(newest) == [replicas.stores]
    assert survey.views(survey.commits[0]) == [replicas.stores, [replicas.mirror]]
    elsewhere = replicas_of(folder, "node2").survey()
    assert [c.step for c in elsewhere.commits] == [5]
    assert lineage.read_manifest(
        Fallback(elsewhere.views(elsewhere.commits[0])[0]), survey.commits[0]
    )


def test_views_of_damaged_checkpoint_use_mirror(folder):
    replicas = replicas_of(folder)
    commit = save(replicas, start(replicas), 5)
    lineage.mark_damaged(replicas.run, commit, "bytes 1 to 2 do not match")
    assert replicas.survey().views(commit) == [[replicas.mirror]]
    lineage.mark_damaged(replicas.mirror, commit, "there too")
    assert replicas.survey().commits == []
    assert replicas.survey().with_damaged == [commit]
