"""Which checkpoints count, while several attempts of one run live and die at once."""

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
    """Begin an attempt that goes on from `step`."""
    attempt = lineage.begin(store, {})
    lineage.amend(store, attempt, {"resumed_from": {"step": step}})
    return attempt


def save(store: Store, attempt: Attempt, step: int) -> Commit:
    content = Content(tensors={"w": torch.full((50,), float(step))})
    made = Writer(store, World(), attempt).start_save(content, step=step).result()
    return Commit(step, attempt.number, f"checkpoints/{made.folder}")


def commit_late(store: Store, attempt: Attempt, step: int) -> Commit:
    """Commit as a writer does that looked for newer attempts just before there was one."""
    behind = LocalStore(store.url)
    behind.list = lambda prefix: (  # type: ignore[method-assign]
        [f"attempts/{attempt.number:04d}.json"] if prefix == "attempts" else store.list(prefix)
    )
    return save(behind, attempt, step)


def step_of(commits: Iterable[Commit]) -> list[tuple[int, int]]:
    return [(commit.step, commit.attempt) for commit in commits]


def surviving(store: Store) -> list[tuple[int, int]]:
    return step_of(lineage.commits(store))


# --- attempts ----------------------------------------------------------------------------------


def test_attempts_are_numbered_from_one_and_have_tokens_of_their_own(store):
    attempts = [lineage.begin(store, {"host": "here"}) for _ in range(12)]
    assert [attempt.number for attempt in attempts] == list(range(1, 13))
    assert len({attempt.token for attempt in attempts}) == 12
    assert store.list("attempts")[0] == "attempts/0001.json"
    for attempt, record in zip(attempts, lineage.records(store), strict=True):
        assert record["attempt"] == attempt.number
        assert record["token"] == attempt.token
        assert record["host"] == "here"
        assert manifest.shard_name(rank=0, world_size=1, token=attempt.token, save=1)


def test_attempts_that_start_at_the_same_moment_get_distinct_numbers(tmp_path):
    barrier = Barrier(8)

    def begin(number: int) -> Attempt:
        own = LocalStore(tmp_path)
        barrier.wait()
        return lineage.begin(own, {"thread": number})

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


def test_amending_adds_facts_and_keeps_the_others(store):
    attempt = lineage.begin(store, {"host": "here"})
    lineage.amend(store, attempt, {"outcome": "done", "resumed_from": {"step": 3}})
    (record,) = lineage.records(store)
    assert (record["host"], record["outcome"], record["resumed_from"]) == (
        "here",
        "done",
        {"step": 3},
    )


@pytest.mark.parametrize("content", [b"", b"{half", b"[]", b"null", b"\xff"])
def test_a_record_that_cannot_be_read_is_named_with_advice(store, content):
    start(store)
    store.replace("attempts/0001.json", content)
    with pytest.raises(StoreError, match=r"0001\.json is not a valid attempt record.*Restore it"):
        lineage.commits(store)


def test_other_files_beside_the_attempts_do_not_disturb(store):
    store.create("attempts/notes.txt", b"x")
    store.create("attempts/old/0007.json", b"x")
    store.create("attempts/².json", b"x")
    assert lineage.begin(store, {}).number == 1


# --- the timeline ------------------------------------------------------------------------------


def test_commits_come_in_the_order_of_their_steps(store):
    attempt = start(store)
    for step in (10, 9, 100_000_000, 99_999_999):
        save(store, attempt, step)
    assert surviving(store) == [(9, 1), (10, 1), (99_999_999, 1), (100_000_000, 1)]
    assert checkpoint.latest(store).step == 100_000_000


def test_what_an_older_attempt_committed_after_the_resumed_step_does_not_count(store):
    first = start(store)
    for step in (10, 20, 30):
        save(store, first, step)
    second = start(store, 20)
    assert surviving(store) == [(10, 1), (20, 1)]
    save(store, second, 25)
    assert surviving(store) == [(10, 1), (20, 1), (25, 2)]
    assert checkpoint.latest(store).attempt == 2


def test_a_manifest_that_appears_too_late_does_not_count(store):
    first = start(store)
    save(store, first, 10)
    second = start(store, 10)
    commit_late(store, first, 20)
    assert surviving(store) == [(10, 1)]
    save(store, second, 15)
    commit_late(store, first, 30)
    assert surviving(store) == [(10, 1), (15, 2)]


def test_a_late_manifest_does_not_count_where_the_newer_attempt_began_anew(store):
    first = start(store)
    start(store, 0)
    commit_late(store, first, 10)
    assert surviving(store) == []


def test_an_attempt_that_has_not_resumed_yet_orphans_nothing(store):
    first = start(store)
    save(store, first, 10)
    lineage.begin(store, {})
    assert surviving(store) == [(10, 1)]


def test_folders_without_a_manifest_and_strange_ones_do_not_count(store):
    start(store)
    store.create(f"checkpoints/{folder_name(5, 1)}/r0.safetensors", b"x")
    store.create("checkpoints/step-5.1/manifest.json", b"x" * 100)
    store.create("checkpoints/manifest.json", b"x" * 100)
    store.create(f"checkpoints/{folder_name(6, 1)}/sub/manifest.json", b"x" * 100)
    store.create(f"other/{folder_name(7, 1)}/manifest.json", b"x" * 100)
    assert surviving(store) == []


def test_a_void_manifest_does_not_count(store):
    attempt = start(store)
    save(store, attempt, 10)
    store.create(f"checkpoints/{folder_name(20, 1)}/manifest.json", void_bytes(2))
    assert surviving(store) == [(10, 1)]
    assert checkpoint.latest(store).step == 10


def test_a_checkpoint_that_is_deleted_while_one_lists_is_no_failure(tmp_path, store):
    attempt = start(store)
    old = save(store, attempt, 10)
    save(store, attempt, 20)

    class Pruned(LocalStore):
        def size(self, key: str) -> int:
            lineage.delete(store, old.folder)
            return super().size(key)

    assert surviving(Pruned(tmp_path)) == [(20, 1)]


def test_a_checkpoint_that_is_deleted_while_one_opens_it_is_refused(store):
    commit = save(store, start(store), 10)
    lineage.delete(store, commit.folder)
    with pytest.raises(CheckpointError, match="deleted in the meantime"):
        lineage.read_manifest(store, commit)


ATTEMPTS = st.lists(
    st.tuples(st.integers(0, 6), st.lists(st.integers(1, 6), max_size=3)), min_size=1, max_size=4
)


@settings(max_examples=40, deadline=None)
@given(ATTEMPTS)
def test_what_counts_is_what_following_the_attempts_one_after_the_other_gives(
    tmp_path_factory, attempts
):
    """Each attempt cuts the timeline where it resumed, then goes on with its own steps."""
    store = LocalStore(tmp_path_factory.mktemp("run"))
    expected: set[tuple[int, int]] = set()
    for number, (resumed, steps) in enumerate(attempts, start=1):
        record = {"attempt": number, "resumed_from": {"step": resumed}}
        store.create(f"attempts/{number:04d}.json", json.dumps(record).encode())
        own = {(resumed + step, number) for step in steps}
        expected = {one for one in expected if one[0] <= resumed} | own
        for step, _ in own:
            store.create(f"checkpoints/{folder_name(step, number)}/manifest.json", b"x" * 64)
    assert surviving(store) == sorted(expected)


# --- superseded --------------------------------------------------------------------------------


def test_an_attempt_that_was_superseded_commits_nothing_more(store):
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


def test_superseded_means_never_start_again():
    assert SupersededError("x").exit_code == NEVER_REQUEUE == 76


def test_the_newest_attempt_is_not_superseded(store):
    first, second = start(store), start(store)
    lineage.check_not_superseded(store, second)
    with pytest.raises(SupersededError):
        lineage.check_not_superseded(store, first)


# --- deleting ----------------------------------------------------------------------------------


class Recording(LocalStore):
    """A real directory that notes the keys it deletes, in order."""

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self.deleted: list[str] = []

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.deleted.append(key.rpartition("/")[2])
            super().delete([key])


def test_a_manifest_is_deleted_before_its_shards(tmp_path, store):
    commit = save(store, start(store), 10)
    store.create(f"{commit.folder}/r00000-of-00001-00000000-9.safetensors", b"x")
    lineage.mark_damaged(store, commit, "test")
    recording = Recording(tmp_path)
    checkpoint.delete(recording, commit)
    assert recording.deleted[0] == "manifest.json"
    assert len(recording.deleted) == 4
    assert store.list("checkpoints") == []


def test_a_deletion_that_ends_at_any_point_never_leaves_half_a_checkpoint(tmp_path):
    class Killed(BaseException):
        pass

    class Dying(LocalStore):
        left = 0

        def delete(self, keys: Iterable[str]) -> None:
            for key in keys:
                if self.left == 0:
                    raise Killed
                self.left -= 1
                super().delete([key])

    for calls in range(2):
        store = LocalStore(tmp_path / str(calls))
        attempt = start(store)
        old, new = save(store, attempt, 10), save(store, attempt, 20)
        dying = Dying(store.url)
        dying.left = calls
        with pytest.raises(Killed):
            lineage.delete(dying, old.folder)
        assert surviving(store) == ([(10, 1), (20, 1)] if calls == 0 else [(20, 1)])
        for commit in lineage.commits(store):
            checkpoint.verify(store, lineage.read_manifest(store, commit))
        lineage.clean(store, start(store, 20), new)
        assert surviving(store)[-1] == (20, 1)


# --- damaged -----------------------------------------------------------------------------------


def test_a_checkpoint_that_is_marked_damaged_is_skipped_and_kept(store):
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
    second = start(store, 10)  # so the damaged one is of an abandoned timeline, besides
    newest = save(store, second, 30)
    lineage.clean(store, second, newest)
    assert set(keys) < set(store.list(damaged.folder))
    assert surviving(store) == [(10, 1), (30, 2)]


# --- cleaning ----------------------------------------------------------------------------------


def test_clean_deletes_what_no_attempt_will_ever_read_and_nothing_else(store):
    first = start(store)
    save(store, first, 10)
    save(store, first, 20)
    store.create(f"checkpoints/{folder_name(30, 1)}/r0.safetensors", b"unfinished")
    second = start(store, 10)
    store.create(f"checkpoints/{folder_name(40, 2)}/r0.safetensors", b"being written")
    store.create("checkpoints/notes/x", b"somebody's")
    newest = save(store, second, 25)
    kept = {
        f"checkpoints/{folder_name(40, 2)}/r0.safetensors",
        "checkpoints/notes/x",
        *store.list(f"checkpoints/{folder_name(10, 1)}"),
        *store.list(newest.folder),
    }
    void = f"checkpoints/{folder_name(30, 1)}/manifest.json"
    lineage.clean(store, second, newest)
    assert set(store.list("checkpoints")) == {*kept, void}
    assert store.read(void) == void_bytes(2)
    lineage.clean(store, second, newest)
    assert set(store.list("checkpoints")) == {*kept, void}
    lineage.clean(store, second, save(store, second, 30))
    assert void not in store.list("checkpoints")  # its step has passed: lineage is enough


def test_an_abandoned_checkpoint_stays_until_the_new_timeline_has_come_as_far(store):
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
    """A real directory on which something happens just before a manifest is created."""

    def __init__(self, root: Path, happens: Callable[[], object]) -> None:
        super().__init__(root)
        self._happens = happens

    def create(self, key: str, data: bytes) -> None:
        if key.endswith("/manifest.json"):
            self._happens()
        super().create(key, data)


def test_a_writer_whose_folder_was_voided_cannot_commit(tmp_path, store):
    first = start(store)
    save(store, first, 10)

    def successor() -> None:
        """Live a whole life between the last look of the old writer and its commit."""
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


def test_a_writer_that_commits_while_it_is_cleaned_away_keeps_its_shards(tmp_path, store):
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
    assert surviving(store) == [(10, 1), (15, 2)]  # and yet it does not count


# --- a list that lags --------------------------------------------------------------------------


class Lagging(LocalStore):
    """A store that does not list the newest keys yet, though they can be read."""

    def __init__(self, url: str, unseen: str) -> None:
        super().__init__(url)
        self.unseen = unseen

    def list(self, prefix: str, *, unfinished: bool = False) -> list[str]:
        return [
            key for key in super().list(prefix, unfinished=unfinished) if self.unseen not in key
        ]


def test_a_commit_that_is_listed_late_leaves_one_timeline(store):
    first = start(store)
    for step in (5, 10):
        save(store, first, step)
    behind = Lagging(store.url, "step-00000010")
    assert surviving(behind) == [(5, 1)]
    second = start(behind, 5)
    save(behind, second, 7)
    assert surviving(store) == [(5, 1), (7, 2)]  # now everybody sees step 10, and that it is void


def test_a_manifest_that_is_listed_late_is_never_voided(store):
    first = start(store)
    commit = save(store, first, 5)
    second = start(store, 5)
    newest = save(store, second, 7)
    behind = Lagging(store.url, "00005.0001/manifest.json")
    lineage.clean(behind, second, newest)
    assert surviving(store) == [(5, 1), (7, 2)]
    checkpoint.verify(store, lineage.read_manifest(store, commit))


def test_an_attempt_that_is_listed_late_keeps_its_number(store):
    start(store)
    assert lineage.begin(Lagging(store.url, "0001.json"), {}).number == 2
