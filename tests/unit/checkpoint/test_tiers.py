"""A run in two places: which attempts there were, and which checkpoints count."""

from pathlib import Path

import pytest
import torch

from trainer import checkpoint
from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import Attempt, Commit
from trainer.checkpoint.state_tree import Content
from trainer.checkpoint.tiers import Tiers
from trainer.checkpoint.writer import Writer
from trainer.cluster.world import World
from trainer.errors import ConfigError
from trainer.storage import LocalStore
from trainer.storage.store import Fallback


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def tiers_of(folder: Path, node: str = "node1") -> Tiers:
    """The stores as they are seen from a node with a disk of its own."""
    return Tiers(LocalStore(str(folder / node)), LocalStore(str(folder / "mirror")))


def start(tiers: Tiers, step: int = 0) -> Attempt:
    attempt = tiers.begin({"host": Path(tiers.run.url).name})
    tiers.amend(attempt, {"resumed_from": {"step": step}})
    return attempt


def save(tiers: Tiers, attempt: Attempt, step: int, *, copied: bool = True) -> Commit:
    content = Content(tensors={"w": torch.full((50,), float(step))})
    made = checkpoint.save(Writer(tiers.run, World(), attempt), content, step=step)
    if copied and tiers.mirror is not None:
        for key in tiers.run.list(f"checkpoints/{made.folder}"):
            tiers.mirror.create(key, tiers.run.read(key))
    return Commit(step, attempt.number, f"checkpoints/{made.folder}")


def steps(tiers: Tiers) -> list[tuple[int, int]]:
    return [(commit.step, commit.attempt) for commit in tiers.survey().commits]


def test_a_number_is_given_once_whichever_node_an_attempt_starts_on(folder):
    nodes = ["node1", "node2", "node1", "node3"]
    numbers = [start(tiers_of(folder, node)).number for node in nodes]
    assert numbers == [1, 2, 3, 4]


def test_records_that_one_store_lost_come_back_from_the_other(folder):
    tiers = tiers_of(folder)
    first = start(tiers)
    lineage.amend(tiers.run, first, {"ended": "now", "outcome": "preempted"})  # not in the mirror
    for store in tiers.stores:
        known = lineage.records(store)
        other = next(each for each in tiers.stores if each is not store)
        assert tiers.records()[0]["outcome"] == "preempted"
        start(tiers, 5)
        assert len(lineage.records(store)) == len(known) + 1
        assert lineage.records(other)[0]["outcome"] == "preempted"
    empty = tiers_of(folder, "node2")
    assert start(empty, 7).number == 4
    assert [r["attempt"] for r in lineage.records(empty.run)] == [1, 2, 3, 4]


def test_a_run_that_gets_a_mirror_later_brings_its_records_there(folder):
    alone = Tiers(LocalStore(str(folder / "node1")))
    save(alone, start(alone), 5)
    tiers = tiers_of(folder)
    assert start(tiers, 5).number == 2
    assert [r["attempt"] for r in lineage.records(tiers.mirror)] == [1, 2]


def test_a_mirror_of_another_run_is_refused(folder):
    start(tiers_of(folder))
    other = Tiers(LocalStore(str(folder / "another")))
    start(other)
    mixed = Tiers(other.run, tiers_of(folder).mirror)
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror=.*of another run.*of its own"):
        mixed.survey()


@pytest.mark.parametrize("lost", ["run", "mirror"])
def test_losing_one_store_loses_nothing_that_the_other_holds(folder, lost):
    tiers = tiers_of(folder)
    attempt = start(tiers)
    for step in (5, 10):
        save(tiers, attempt, step)
    store = getattr(tiers, lost)
    for key in reversed(store.list("")):
        store.delete([key])
    assert steps(tiers) == [(5, 1), (10, 1)]
    assert start(tiers, 10).number == 2
    view = Fallback(tiers.survey().views(tiers.survey().commits[-1])[0])
    assert lineage.read_manifest(view, tiers.survey().commits[-1]).step == 10


def test_lineage_decides_not_the_higher_step(folder):
    """A node comes back with step 1,400 of a timeline that was abandoned at 1,000."""
    node1, node2 = tiers_of(folder), tiers_of(folder, "node2")
    first = start(node1)
    save(node1, first, 1000)
    save(node1, first, 1400, copied=False)
    second = start(node2, 1000)
    save(node2, second, 1100)
    assert steps(node1) == [(1000, 1), (1100, 2)]
    start(node1, 1100)
    assert [c.step for c in lineage.commits(node1.run)] == [1000]  # the record is here by now


def test_what_is_here_alone_is_taken_and_what_is_not_here_comes_from_the_mirror(folder):
    tiers = tiers_of(folder)
    attempt = start(tiers)
    save(tiers, attempt, 5)
    newest = save(tiers, attempt, 10, copied=False)
    survey = tiers.survey()
    assert survey.views(newest) == [tiers.stores]
    assert survey.views(survey.commits[0]) == [tiers.stores, [tiers.mirror]]
    elsewhere = tiers_of(folder, "node2").survey()
    assert [c.step for c in elsewhere.commits] == [5]
    assert lineage.read_manifest(
        Fallback(elsewhere.views(elsewhere.commits[0])[0]), survey.commits[0]
    )


def test_what_was_proven_wrong_here_is_read_from_the_mirror(folder):
    tiers = tiers_of(folder)
    commit = save(tiers, start(tiers), 5)
    lineage.mark_damaged(tiers.run, commit, "bytes 1 to 2 do not match")
    assert tiers.survey().views(commit) == [[tiers.mirror]]
    lineage.mark_damaged(tiers.mirror, commit, "there too")
    assert tiers.survey().commits == []
    assert tiers.survey().with_damaged == [commit]
