"""Selection of valid checkpoints while several attempts of one run start, save and crash."""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import checkpoint
from trainer.checkpoint import lineage, manifest
from trainer.checkpoint.lineage import Attempt, Commit
from trainer.checkpoint.manifest import folder_name, void_bytes
from trainer.checkpoint.state_tree import Content
from trainer.checkpoint.writer import Writer
from trainer.cluster.world import World
from trainer.errors import NEVER_REQUEUE, CheckpointError, StoreError, SupersededError
from trainer.storage import LocalStore, Store


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


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
    assert lineage.begin(store, {}).number == 1


# --- the timeline --------------------------------------------------------------------------------


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


# --- deleting ------------------------------------------------------------------------------------


class Recording(LocalStore):
    """A local store that records deleted keys in order."""

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self.deleted: list[str] = []

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.deleted.append(key.rpartition("/")[2])
            super().delete([key])


def test_delete_removes_manifest_before_shards(tmp_path, store):
    commit = save(store, start(store), 10)
    store.create(f"{commit.folder}/r00000-of-00001-00000000-9.safetensors", b"x")
    lineage.mark_damaged(store, commit, "test")
    recording = Recording(tmp_path)
    checkpoint.delete(recording, commit)
    assert recording.deleted[0] == "manifest.json"
    assert len(recording.deleted) == 4
    assert store.list("checkpoints") == []


def test_interrupted_delete_leaves_no_partial_checkpoint(tmp_path):
    class Killed(BaseException):
        pass

    class Dying(LocalStore):
        remaining = 0

        def delete(self, keys: Iterable[str]) -> None:
            for key in keys:
                if self.remaining == 0:
                    raise Killed
                self.remaining -= 1
                super().delete([key])

    for calls in range(2):
        store = LocalStore(tmp_path / str(calls))
        attempt = start(store)
        old, new = save(store, attempt, 10), save(store, attempt, 20)
        dying = Dying(store.url)
        dying.remaining = calls
        with pytest.raises(Killed):
            lineage.delete(dying, old.folder)
        assert surviving(store) == ([(10, 1), (20, 1)] if calls == 0 else [(20, 1)])
        for commit in lineage.commits(store):
            checkpoint.verify(store, lineage.read_manifest(store, commit))
        lineage.clean(store, start(store, 20), new)
        assert surviving(store)[-1] == (20, 1)


# --- damaged -------------------------------------------------------------------------------------


def test_damaged_checkpoint_is_skipped_and_retained(store):
    attempt = start(store)
    save(store, attempt, 10)
    damaged = save(store, attempt, 20)
    keys = store.list(damaged.folder)
    lineage.mark_damaged(store, damaged, "bytes 0 to 5")
    assert surviving(store) == [(10, 1)]
    assert step_of(lineage.commits(store, damaged=True)) == [(10, 1), (20, 1)]
    assert checkpoint.latest(store).step == 10
    mark = json.loads(store.read(f"{damaged.folder}/damaged.json"))
    assert mark["why"] == "bytes 0 to 5"
    second = start(store, 10)  # so the damaged checkpoint is also abandoned
    newest = save(store, second, 30)
    lineage.clean(store, second, newest)
    assert set(keys) < set(store.list(damaged.folder))
    assert surviving(store) == [(10, 1), (30, 2)]


# --- cleaning ------------------------------------------------------------------------------------


def test_clean_deletes_only_unreachable_files(store):
    first = start(store)
    save(store, first, 10)
    save(store, first, 20)
    store.create(f"checkpoints/{folder_name(30, 1)}/r0.safetensors", b"unfinished")
    second = start(store, 10)
    store.create(f"checkpoints/{folder_name(40, 2)}/r0.safetensors", b"being written")
    store.create("checkpoints/notes/x", b"notes")
    newest = save(store, second, 25)
    expected = {
        f"checkpoints/{folder_name(40, 2)}/r0.safetensors",
        "checkpoints/notes/x",
        *store.list(f"checkpoints/{folder_name(10, 1)}"),
        *store.list(newest.folder),
    }
    void = f"checkpoints/{folder_name(30, 1)}/manifest.json"
    lineage.clean(store, second, newest)
    assert set(store.list("checkpoints")) == {*expected, void}
    assert store.read(void) == void_bytes(2)
    lineage.clean(store, second, newest)
    assert set(store.list("checkpoints")) == {*expected, void}
    lineage.clean(store, second, save(store, second, 30))
    assert void not in store.list("checkpoints")  # lineage alone excludes a past step


def test_abandoned_checkpoint_stays_until_new_timeline_reaches_its_step(store):
    first = start(store)
    for step in (10, 30):
        save(store, first, step)
    second = start(store, 10)
    lineage.clean(store, second, save(store, second, 20))
    assert store.list(f"checkpoints/{folder_name(30, 1)}") != []
    lineage.clean(store, second, save(store, second, 30))
    assert store.list(f"checkpoints/{folder_name(30, 1)}") == []
    assert surviving(store) == [(10, 1), (20, 2), (30, 2)]


class AtCreation(LocalStore):
    """A local store that runs a callback just before a manifest is created."""

    def __init__(self, root: Path, happens: Callable[[], object]) -> None:
        super().__init__(root)
        self._happens = happens

    def create(self, key: str, data: bytes) -> None:
        if key.endswith("/manifest.json"):
            self._happens()
        super().create(key, data)


def test_writer_of_voided_folder_cannot_commit(tmp_path, store):
    first = start(store)
    save(store, first, 10)

    def successor() -> None:
        """Run a complete attempt between the old writer's last check and its commit."""
        second = start(store, 10)
        lineage.clean(store, second, save(store, second, 15))

    with pytest.raises(CheckpointError, match="committed this checkpoint or marked it abandoned"):
        save(AtCreation(tmp_path, successor), first, 20)
    assert surviving(store) == [(10, 1), (15, 2)]
    assert store.list(f"checkpoints/{folder_name(20, 1)}") == [
        f"checkpoints/{folder_name(20, 1)}/manifest.json"
    ]
    for commit in lineage.commits(store):
        checkpoint.verify(store, lineage.read_manifest(store, commit))


def test_clean_keeps_shards_of_concurrent_commit(tmp_path, store):
    first = start(store)
    save(store, first, 10)
    unfinished = f"checkpoints/{folder_name(20, 1)}"
    store.create(f"{unfinished}/r0.safetensors", b"x")
    second = start(store, 10)
    newest = save(store, second, 15)
    cleaning = AtCreation(
        tmp_path, lambda: store.create(f"{unfinished}/manifest.json", b"its writer's" * 9)
    )
    lineage.clean(cleaning, second, newest)
    assert len(store.list(unfinished)) == 2
    assert surviving(store) == [(10, 1), (15, 2)]  # the concurrent commit is ignored


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
