"""Deletion, damage marks and cleaning while other attempts save."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from support.timelines import save, start, step_of, surviving

from trainer import checkpoint
from trainer.checkpoint import lineage
from trainer.checkpoint.manifest import folder_name, void_bytes
from trainer.errors import CheckpointError
from trainer.storage import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


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
