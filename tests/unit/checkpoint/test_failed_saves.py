"""Saves and loads on a store that fails at any call."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.faulty_stores import FaultyStore
from support.saved_tensors import SMALL, assert_equal, blank, keys_on, load_all, save, writer_on
from torch import Tensor

from trainer import checkpoint
from trainer.checkpoint import lineage
from trainer.checkpoint.state_tree import Content
from trainer.checkpoint.writer import Writer
from trainer.cluster.world import World
from trainer.errors import CheckpointError, StoreError
from trainer.storage import LocalStore


class Killed(BaseException):
    """The process ends here."""


def prepared(root: Path) -> tuple[LocalStore, lineage.Attempt]:
    """Return a store with a committed step 1, and the attempt that committed it."""
    store = LocalStore(root)
    attempt = lineage.begin(store, {})
    save(Writer(store, World(), attempt), SMALL, 1)
    return store, attempt


def calls_of(root: Path, do: Callable[[FaultyStore], Any]) -> int:
    counting = FaultyStore(root)
    do(counting)
    assert counting.calls
    return len(counting.calls)


def newer(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value + 1 for name, value in values.items()}


@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("how", ["before", "torn"])
@pytest.mark.parametrize("error", [StoreError, Killed])
def test_failed_save_call_keeps_previous_step_loadable(tmp_path, forever, how, error):
    _, first = prepared(tmp_path / "counted")
    count = calls_of(
        tmp_path / "counted", lambda store: save(Writer(store, World(), first), newer(SMALL), 2)
    )
    assert count >= 5  # open, put, finish the shard, look for newer attempts, create the manifest
    for n in range(1, count + 1):
        store, attempt = prepared(tmp_path / f"{n}")
        faulty = FaultyStore(tmp_path / f"{n}", n, how, forever=forever, error=error)
        with pytest.raises(error, match="the disk failed"):
            save(Writer(faulty, World(), attempt), newer(SMALL), 2)
        newest = checkpoint.latest(store)
        if newest.step == 2:  # the last call failed after the commit
            assert (how, n) == ("torn", count)
            continue
        checkpoint.verify(store, newest)
        assert_equal(load_all(store, SMALL), SMALL)
        save(writer_on(store), newer(SMALL), 2)  # orphaned files do not disturb the next attempt
        assert_equal(load_all(store, SMALL), newer(SMALL))


@pytest.mark.parametrize("error", [StoreError, Killed])
def test_lost_reply_of_save_call_keeps_latest_intact(tmp_path, error):
    _, first = prepared(tmp_path / "counted")
    count = calls_of(
        tmp_path / "counted", lambda store: save(Writer(store, World(), first), newer(SMALL), 2)
    )
    steps = []
    for n in range(1, count + 1):
        store, attempt = prepared(tmp_path / f"{n}")
        faulty = FaultyStore(tmp_path / f"{n}", n, "after", error=error)
        with pytest.raises(error, match="the disk failed"):
            save(Writer(faulty, World(), attempt), newer(SMALL), 2)
        newest = checkpoint.latest(store)
        checkpoint.verify(store, newest)
        expected = {1: SMALL, 2: newer(SMALL)}[newest.step]
        assert_equal(load_all(store, SMALL), expected)
        steps.append(newest.step)
    assert steps == [1] * (count - 1) + [2]  # only creating the manifest commits


def test_repeated_save_accepts_commit_with_lost_reply(tmp_path):
    store, attempt = prepared(tmp_path)
    faulty = FaultyStore(tmp_path)
    writer = Writer(faulty, World(), attempt)
    save(writer, newer(SMALL), 2)
    count = len(faulty.calls)
    faulty.fail_at, faulty.how = 2 * count, "after"
    with pytest.raises(StoreError, match="failed in create"):
        save(writer, newer(SMALL), 3)
    before = keys_on(store)
    save(writer, newer(SMALL), 3)
    assert keys_on(store) == before
    assert checkpoint.latest(store).step == 3
    with pytest.raises(CheckpointError, match="already has a manifest"):
        save(writer, SMALL, 2)  # the commit of step 2 was confirmed


def test_next_save_succeeds_after_each_failure(tmp_path):
    _, first = prepared(tmp_path / "counted")
    count = calls_of(
        tmp_path / "counted", lambda store: save(Writer(store, World(), first), newer(SMALL), 2)
    )
    for n in range(1, count + 1):
        store, attempt = prepared(tmp_path / f"{n}")
        writer = Writer(FaultyStore(tmp_path / f"{n}", n), World(), attempt)
        with pytest.raises(StoreError):
            save(writer, newer(SMALL), 2)
        save(writer, newer(SMALL), 2)
        assert checkpoint.latest(store).step == 2
        assert_equal(load_all(store, SMALL), newer(SMALL))


@pytest.mark.parametrize("how", ["before", "after", "torn"])
def test_failed_open_leaves_no_files(tmp_path, how):
    store, attempt = prepared(tmp_path)
    before = keys_on(store)
    with pytest.raises(StoreError, match="failed in open_new"):
        save(Writer(FaultyStore(tmp_path, 1, how), World(), attempt), newer(SMALL), 2)
    assert keys_on(store) == before
    assert not list(tmp_path.glob("checkpoints/step-00000002*"))


def test_save_error_is_reported_when_cleanup_fails_too(tmp_path):
    _, attempt = prepared(tmp_path)
    with pytest.raises(StoreError, match="failed in open_new, call 1"):
        save(Writer(FaultyStore(tmp_path, 1, forever=True), World(), attempt), SMALL, 2)


def test_failed_read_is_not_reported_as_damage(tmp_path):
    store, _ = prepared(tmp_path)
    newest = checkpoint.latest(store)

    def load(faulty: FaultyStore) -> None:
        checkpoint.load(faulty, newest, {name: blank(value) for name, value in SMALL.items()})

    for n in range(1, calls_of(tmp_path, load) + 1):
        with pytest.raises(StoreError, match="the disk failed"):
            load(FaultyStore(tmp_path, n))
        with pytest.raises(StoreError, match="the disk failed"):
            load(FaultyStore(tmp_path, n, forever=True))
    checkpoint.verify(store, newest)


def test_save_rejects_committed_step(tmp_path):
    store = LocalStore(tmp_path)
    writer = writer_on(store)
    save(writer, SMALL, 1)
    before = keys_on(store)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="already has a manifest"):
            save(writer, newer(SMALL), 1)
    assert keys_on(store) == before
    assert_equal(load_all(store, SMALL), SMALL)
    save(writer, newer(SMALL), 2)
    assert_equal(load_all(store, SMALL), newer(SMALL))


def test_second_writer_of_attempt_keeps_committed_files(tmp_path):
    store, attempt = prepared(tmp_path)
    before = keys_on(store)
    with pytest.raises(StoreError, match="exists already"):
        save(Writer(store, World(), attempt), newer(SMALL), 1)
    assert keys_on(store) == before
    assert_equal(load_all(store, SMALL), SMALL)


def test_failing_before_commit_callback_commits_nothing(tmp_path):
    store, attempt = prepared(tmp_path)
    before = keys_on(store)

    def flush() -> None:
        raise CheckpointError("the tracker's disk is full")

    pending = Writer(store, World(), attempt).start_save(
        Content(tensors=SMALL), step=2, before_commit=flush
    )
    with pytest.raises(CheckpointError, match="tracker"):
        pending.result()
    assert checkpoint.latest(store).step == 1
    assert keys_on(store) == before


def test_before_commit_runs_with_shards_and_without_manifest(tmp_path):
    store = LocalStore(tmp_path)
    seen: list[str] = []
    pending = writer_on(store).start_save(
        Content(tensors=SMALL),
        step=2,
        before_commit=lambda: seen.extend(store.list("checkpoints")),
    )
    manifest = pending.result()
    assert seen == [f"checkpoints/{manifest.folder}/{name}" for name in manifest.files]
