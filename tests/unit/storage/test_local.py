"""What is particular to a directory as a store."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.faulty_stores import put

from trainer.errors import RUN_AGAIN, StoreError
from trainer.storage import AlreadyExists, LocalStore, Store, open_store


def test_a_directory_is_opened_by_its_path_or_as_a_file_url(tmp_path):
    put(open_store(str(tmp_path)), "a", b"x")
    assert open_store(f"file://{tmp_path}").read("a") == b"x"
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_file_that_is_not_published_yet_is_not_listed(tmp_path):
    store = LocalStore(tmp_path)
    store.create("checkpoints/a", b"x")
    (tmp_path / "checkpoints" / ".tmp-0123").write_bytes(b"half")
    assert store.list("") == store.list("checkpoints") == ["checkpoints/a"]


def test_no_temporary_file_stays_behind(tmp_path):
    store = LocalStore(tmp_path)
    store.create("a/x", b"one")
    store.create("a/x", b"one")
    with pytest.raises(AlreadyExists):
        store.create("a/x", b"two")
    store.replace("a/x", b"three")
    store.probe()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "x"]


def test_an_emptied_folder_goes_and_the_root_stays(tmp_path):
    store = LocalStore(tmp_path / "run")
    put(store, "checkpoints/step/a", b"x")
    put(store, "b", b"x")
    store.delete(["checkpoints/step/a", "b"])
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["checkpoints"]


def test_a_folder_goes_with_what_a_killed_process_had_not_published(tmp_path):
    store = LocalStore(tmp_path)
    put(store, "step/a", b"x")
    put(store, "step/b", b"x")
    (tmp_path / "step" / ".tmp-0123").write_bytes(b"half")
    store.delete(["step/a"])
    assert sorted(path.name for path in (tmp_path / "step").iterdir()) == [".tmp-0123", "b"]
    store.delete(["step/b"])
    assert list(tmp_path.iterdir()) == []


def fails(store: Store, *, key: str = "folder/key") -> Iterator[StoreError]:
    """Yield the error of every method that changes the store."""
    for call in (
        lambda: put(store, key, b"x"),
        lambda: store.create(key, b"x"),
        lambda: store.replace(key, b"x"),
    ):
        with pytest.raises(StoreError) as caught:
            call()
        yield caught.value


def test_a_file_in_the_place_of_a_folder_is_named_with_advice(tmp_path):
    (tmp_path / "folder").write_text("a file")
    for error in fails(LocalStore(tmp_path)):
        assert str(tmp_path / "folder" / "key") in str(error)
        assert "a file stands where a folder is needed" in str(error)
        assert error.exit_code == RUN_AGAIN
    with pytest.raises(StoreError, match="a file stands where a folder is needed"):
        LocalStore(tmp_path).read("folder/key")
    with pytest.raises(StoreError, match="a file stands where a folder is needed"):
        LocalStore(tmp_path).list("folder")
    assert (tmp_path / "folder").read_text() == "a file"


def test_a_run_dir_that_is_a_file_is_named_with_advice(tmp_path):
    (tmp_path / "run").write_text("a file")
    store = LocalStore(tmp_path / "run")
    for error in fails(store):
        assert str(tmp_path / "run") in str(error)
        assert "a file stands where a folder is needed" in str(error)
    with pytest.raises(StoreError, match="a file stands where a folder is needed"):
        store.probe()


@pytest.mark.parametrize("place", ["/proc/perdure", "/sys/perdure"])
def test_a_file_system_that_takes_no_files_is_named_with_advice(place):
    store = LocalStore(place)
    for error in fails(store):
        assert place in str(error)
        assert str(error).rpartition(";")[2].strip()
    with pytest.raises(StoreError, match=place):
        store.probe()


def test_a_folder_in_the_place_of_a_file_is_a_store_error(tmp_path):
    (tmp_path / "folder" / "key").mkdir(parents=True)
    store = LocalStore(tmp_path)
    for error in fails(store):
        assert str(tmp_path / "folder" / "key") in str(error)
    with pytest.raises(StoreError):
        store.read("folder/key")
    with pytest.raises(StoreError):
        store.delete(["folder/key"])
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["key"]


@contextmanager
def files_limited_to(nbytes: int) -> Iterator[None]:
    """Let the kernel refuse larger files; so a write fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_publication_that_fails_in_the_middle_publishes_and_leaves_nothing(tmp_path):
    store = LocalStore(tmp_path)
    store.create("a/old", b"old")
    with files_limited_to(4096), pytest.raises(StoreError, match="EFBIG"):
        store.create("a/new", bytes(10_000))
    with files_limited_to(4096), pytest.raises(StoreError, match="EFBIG"):
        store.replace("a/old", bytes(10_000))
    assert store.read("a/old") == b"old"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["old"]


def test_a_write_that_fails_in_the_middle_is_reported_and_can_be_deleted(tmp_path):
    store = LocalStore(tmp_path)
    with files_limited_to(4096), pytest.raises(StoreError, match="EFBIG"):
        put(store, "a/shard", bytes(6000))
    store.delete(["a/shard"])
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_leads_nowhere_is_an_entry_and_no_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "there").symlink_to("folder")
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "gone").symlink_to("nothing")
    assert LocalStore(tmp_path).entries("") == ["folder/", "gone", "itself", "there/"]
