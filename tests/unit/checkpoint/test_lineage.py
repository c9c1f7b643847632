"""Selection of valid checkpoints while several attempts of one run start, save and crash."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.timelines import commit_late, save, start, surviving

from trainer import checkpoint
from trainer.checkpoint import lineage, manifest
from trainer.checkpoint.lineage import Attempt
from trainer.checkpoint.manifest import folder_name, void_bytes
from trainer.errors import NEVER_REQUEUE, CheckpointError, StoreError, SupersededError
from trainer.storage import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


# --- attempts ------------------------------------------------------------------------------------


def test_begin_numbers_attempts_from_one_with_distinct_tokens(store):
    attempts = [lineage.begin(store, {"host": "here"}) for _ in range(12)]
    assert [attempt.number for attempt in attempts] == list(range(1, 13))
    assert len({attempt.token for attempt in attempts}) == 12
    assert store.list("attempts")[0] == "attempts/0001.json"
    for attempt, record in zip(attempts, lineage.records(store), strict=True):
        assert record["attempt"] == attempt.number
        assert record["token"] == attempt.token
        assert record["host"] == "here"
        assert manifest.shard_name(rank=0, world_size=1, token=attempt.token, save=1)


def test_begin_in_parallel_gives_distinct_numbers(tmp_path):
    barrier = Barrier(8)

    def begin(number: int) -> Attempt:
        store = LocalStore(tmp_path)
        barrier.wait()
        return lineage.begin(store, {"thread": number})

    with ThreadPoolExecutor(8) as pool:
        attempts = list(pool.map(begin, range(8)))
    assert sorted(attempt.number for attempt in attempts) == list(range(1, 9))
    tokens = {
        record["attempt"]: record["token"] for record in lineage.records(LocalStore(tmp_path))
    }
    assert {attempt.number: attempt.token for attempt in attempts} == tokens


def test_more_than_9999_attempts_keep_their_order(store):
    for number in (9999, 10000):
        store.create(f"attempts/{number:04d}.json", json.dumps({"attempt": number}).encode())
    assert lineage.begin(store, {}).number == 10001
    assert [record["attempt"] for record in lineage.records(store)] == [9999, 10000, 10001]


def test_amend_adds_fields_and_keeps_others(store):
    attempt = lineage.begin(store, {"host": "here"})
    lineage.amend(store, attempt, {"outcome": "done", "resumed_from": {"step": 3}})
    (record,) = lineage.records(store)
    assert (record["host"], record["outcome"], record["resumed_from"]) == (
        "here",
        "done",
        {"step": 3},
    )


@pytest.mark.parametrize("content", [b"", b"{half", b"[]", b"null", b"\xff"])
def test_commits_reports_invalid_attempt_record(store, content):
    start(store)
    store.replace("attempts/0001.json", content)
    with pytest.raises(StoreError, match=r"0001\.json is not a valid attempt record.*Restore it"):
        lineage.commits(store)


def test_begin_ignores_other_files(store):
    store.create("attempts/notes.txt", b"x")
    store.create("attempts/old/0007.json", b"x")
    store.create("attempts/².json", b"x")
    store.create("attempts/00007.json", b"x")
    assert lineage.begin(store, {}).number == 1


# --- the timeline --------------------------------------------------------------------------------


def test_records_ignore_origin_in_heartbeat(store):
    attempt = lineage.begin(store, {})
    lineage.write_heartbeat(store, attempt, {"resumed_from": "nowhere", "last_step": 3})
    (record,) = lineage.records(store)
    assert "resumed_from" not in record
    assert record["last_step"] == 3


def test_commits_are_sorted_by_step(store):
    attempt = start(store)
    for step in (10, 9, 100_000_000, 99_999_999):
        save(store, attempt, step)
    assert surviving(store) == [(9, 1), (10, 1), (99_999_999, 1), (100_000_000, 1)]
    assert checkpoint.latest(store).step == 100_000_000


def test_commits_of_older_attempt_after_resumed_step_are_ignored(store):
    first = start(store)
    for step in (10, 20, 30):
        save(store, first, step)
    second = start(store, 20)
    assert surviving(store) == [(10, 1), (20, 1)]
    save(store, second, 25)
    assert surviving(store) == [(10, 1), (20, 1), (25, 2)]
    assert checkpoint.latest(store).attempt == 2


def test_late_manifest_is_ignored(store):
    first = start(store)
    save(store, first, 10)
    second = start(store, 10)
    commit_late(store, first, 20)
    assert surviving(store) == [(10, 1)]
    save(store, second, 15)
    commit_late(store, first, 30)
    assert surviving(store) == [(10, 1), (15, 2)]


def test_late_manifest_is_ignored_after_newer_attempt_started_over(store):
    first = start(store)
    start(store, 0)
    commit_late(store, first, 10)
    assert surviving(store) == []


def test_attempt_before_resume_abandons_nothing(store):
    first = start(store)
    save(store, first, 10)
    lineage.begin(store, {})
    assert surviving(store) == [(10, 1)]


def test_commits_ignores_other_and_incomplete_folders(store):
    start(store)
    store.create(f"checkpoints/{folder_name(5, 1)}/r0.safetensors", b"x")
    store.create("checkpoints/step-5.1/manifest.json", b"x" * 100)
    store.create("checkpoints/manifest.json", b"x" * 100)
    store.create(f"checkpoints/{folder_name(6, 1)}/sub/manifest.json", b"x" * 100)
    store.create(f"other/{folder_name(7, 1)}/manifest.json", b"x" * 100)
    assert surviving(store) == []


def test_void_manifest_is_ignored(store):
    attempt = start(store)
    save(store, attempt, 10)
    store.create(f"checkpoints/{folder_name(20, 1)}/manifest.json", void_bytes(2))
    assert surviving(store) == [(10, 1)]
    assert checkpoint.latest(store).step == 10


def test_commits_tolerates_concurrent_deletion(tmp_path, store):
    attempt = start(store)
    old = save(store, attempt, 10)
    save(store, attempt, 20)

    class Pruned(LocalStore):
        def size(self, key: str) -> int:
            lineage.delete(store, old.folder)
            return super().size(key)

    assert surviving(Pruned(tmp_path)) == [(20, 1)]


def test_read_manifest_of_deleted_checkpoint_raises(store):
    commit = save(store, start(store), 10)
    lineage.delete(store, commit.folder)
    with pytest.raises(CheckpointError, match="deleted in the meantime"):
        lineage.read_manifest(store, commit)


ATTEMPTS = st.lists(
    st.tuples(st.integers(0, 6), st.lists(st.integers(1, 6), max_size=3)), min_size=1, max_size=4
)


@settings(max_examples=40, deadline=None)
@given(ATTEMPTS)
def test_commits_equal_replay_of_attempts(tmp_path_factory, attempts):
    """Each attempt truncates the timeline at its resumed step, then appends its steps."""
    store = LocalStore(tmp_path_factory.mktemp("run"))
    expected: set[tuple[int, int]] = set()
    for number, (resumed, steps) in enumerate(attempts, start=1):
        record = {"attempt": number, "resumed_from": {"step": resumed}}
        store.create(f"attempts/{number:04d}.json", json.dumps(record).encode())
        commits = {(resumed + step, number) for step in steps}
        expected = {one for one in expected if one[0] <= resumed} | commits
        for step, _ in commits:
            store.create(f"checkpoints/{folder_name(step, number)}/manifest.json", b"x" * 64)
    assert surviving(store) == sorted(expected)


# --- superseded ----------------------------------------------------------------------------------


def test_superseded_attempt_commits_nothing(store):
    first = start(store)
    save(store, first, 10)
    second = lineage.begin(store, {"host": "node7", "pid": 4321})
    with pytest.raises(
        SupersededError, match=r"attempt 2 was started .* on node7 \(process 4321\)"
    ):
        save(store, first, 20)
    assert surviving(store) == [(10, 1)]
    assert [key for key in store.list("checkpoints") if "00000020" in key] == []
    save(store, second, 20)
    assert surviving(store) == [(10, 1), (20, 2)]


def test_superseded_error_prevents_requeue():
    assert SupersededError("x").exit_code == NEVER_REQUEUE == 76


def test_newest_attempt_is_not_superseded(store):
    first, second = start(store), start(store)
    lineage.check_not_superseded(store, second)
    with pytest.raises(SupersededError):
        lineage.check_not_superseded(store, first)


# --- stale listings ------------------------------------------------------------------------------


class LaggingList(LocalStore):
    """A store whose listing omits new keys that can already be read."""

    def __init__(self, url: str, unseen: str) -> None:
        super().__init__(url)
        self.unseen = unseen

    def list(self, prefix: str, *, unfinished: bool = False) -> list[str]:
        return [
            key for key in super().list(prefix, unfinished=unfinished) if self.unseen not in key
        ]


def test_commit_listed_late_leaves_one_timeline(store):
    first = start(store)
    for step in (5, 10):
        save(store, first, step)
    behind = LaggingList(store.url, "step-00000010")
    assert surviving(behind) == [(5, 1)]
    second = start(behind, 5)
    save(behind, second, 7)
    assert surviving(store) == [(5, 1), (7, 2)]  # step 10 is listed now, but void


def test_clean_never_voids_manifest_listed_late(store):
    first = start(store)
    commit = save(store, first, 5)
    second = start(store, 5)
    newest = save(store, second, 7)
    behind = LaggingList(store.url, "00005.0001/manifest.json")
    lineage.clean(behind, second, newest)
    assert surviving(store) == [(5, 1), (7, 2)]
    checkpoint.verify(store, lineage.read_manifest(store, commit))


def test_begin_skips_number_of_attempt_listed_late(store):
    start(store)
    assert lineage.begin(LaggingList(store.url, "0001.json"), {}).number == 2
