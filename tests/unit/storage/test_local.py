"""Behaviour specific to LocalStore."""

import errno
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.faulty_stores import put

from trainer.errors import FAILURE, RUN_AGAIN, StoreError
from trainer.storage import AlreadyExists, LocalStore, Store, local, open_store


def test_open_store_accepts_path_and_file_url(tmp_path):
    put(open_store(str(tmp_path)), "a", b"x")
    assert open_store(f"file://{tmp_path}").read("a") == b"x"
    assert (tmp_path / "a").read_bytes() == b"x"


def test_list_omits_unpublished_files(tmp_path):
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


def test_delete_removes_empty_folder_but_not_root(tmp_path):
    store = LocalStore(tmp_path / "run")
    put(store, "checkpoints/step/a", b"x")
    put(store, "b", b"x")
    store.delete(["checkpoints/step/a", "b"])
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["checkpoints"]


def test_delete_removes_folder_with_temporary_files(tmp_path):
    store = LocalStore(tmp_path)
    put(store, "step/a", b"x")
    put(store, "step/b", b"x")
    (tmp_path / "step" / ".tmp-0123").write_bytes(b"half")
    store.delete(["step/a"])
    assert sorted(path.name for path in (tmp_path / "step").iterdir()) == [".tmp-0123", "b"]
    store.delete(["step/b"])
    assert list(tmp_path.iterdir()) == []


def failing(number):
    def fail(*arguments, **settings):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("can_rename", [True, False], ids=["rename", "O_EXCL"])
def test_create_without_hard_links_is_exclusive(tmp_path, monkeypatch, number, can_rename):
    monkeypatch.setattr(os, "link", failing(number))
    if not can_rename:
        monkeypatch.setattr(local, "_rename_to_new", failing(errno.EINVAL))
    store = LocalStore(tmp_path)
    warning = store.probe()
    assert ("supports neither hard links nor exclusive renames" in warning) == (not can_rename)
    store.create("a/x", b"one")
    store.create("a/x", b"one")
    with pytest.raises(AlreadyExists):
        store.create("a/x", b"two")
    assert (tmp_path / "a" / "x").read_bytes() == b"one"
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "x"]


def test_create_without_hard_links_has_one_winner(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    results = []

    def create(text):
        try:
            LocalStore(tmp_path).create("x", text)
        except AlreadyExists:
            return
        results.append(text)

    texts = [f"writer {number}".encode() * 1000 for number in range(16)]
    threads = [threading.Thread(target=create, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(tmp_path / "x").read_bytes()]


def test_failing_hard_link_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", failing(errno.EIO))
    with pytest.raises(StoreError, match=r"hard link: Input/output error \(EIO\)"):
        LocalStore(tmp_path / "run").create("x", b"one")


def test_list_and_delete_follow_links_to_folders(tmp_path):
    store, disk = LocalStore(tmp_path / "run"), tmp_path / "disk"
    store.create("checkpoints/one/a", b"x")
    disk.mkdir()
    os.rename(tmp_path / "run/checkpoints/one", disk / "one")
    os.symlink(disk / "one", tmp_path / "run/checkpoints/one")
    os.symlink(tmp_path / "run", tmp_path / "run/checkpoints/loop")
    os.symlink("gone", tmp_path / "run/checkpoints/dangling")
    assert store.list("checkpoints") == ["checkpoints/dangling", "checkpoints/one/a"]
    store.delete(["checkpoints/one/a"])
    assert list(disk.iterdir()) == []
    assert not (tmp_path / "run/checkpoints/one").is_symlink()


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


def test_file_in_the_way_of_a_folder_raises_store_error(tmp_path):
    (tmp_path / "folder").write_text("a file")
    for error in fails(LocalStore(tmp_path)):
        assert str(tmp_path / "folder" / "key") in str(error)
        assert "a file is in the way of a folder" in str(error)
        assert error.exit_code == FAILURE  # no other start would succeed
    with pytest.raises(StoreError, match="a file is in the way of a folder"):
        LocalStore(tmp_path).read("folder/key")
    with pytest.raises(StoreError, match="a file is in the way of a folder"):
        LocalStore(tmp_path).list("folder")
    assert (tmp_path / "folder").read_text() == "a file"


@pytest.mark.parametrize(("number", "code"), [
    (errno.EACCES, FAILURE), (errno.EROFS, FAILURE), (errno.EPERM, FAILURE),
    (errno.ENOSPC, RUN_AGAIN), (errno.EDQUOT, RUN_AGAIN), (errno.EIO, RUN_AGAIN),
    (errno.ESTALE, RUN_AGAIN), (errno.ETIMEDOUT, RUN_AGAIN),
])  # fmt: skip
def test_exit_code_of_a_disk_error_depends_on_whether_it_may_pass(
    tmp_path, monkeypatch, number, code
):
    def fail(path, *arguments, **more):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", fail)  # the kernel, which is not under test
    for error in fails(LocalStore(tmp_path)):
        assert error.exit_code == code


def test_run_dir_that_is_a_file_raises_store_error(tmp_path):
    (tmp_path / "run").write_text("a file")
    store = LocalStore(tmp_path / "run")
    for error in fails(store):
        assert str(tmp_path / "run") in str(error)
        assert "a file is in the way of a folder" in str(error)
    with pytest.raises(StoreError, match="a file is in the way of a folder"):
        store.probe()


@pytest.mark.parametrize("folder", ["/proc/perdure", "/sys/perdure"])
def test_file_system_without_new_files_raises_store_error(folder):
    store = LocalStore(folder)
    for error in fails(store):
        assert folder in str(error)
        assert str(error).rpartition(";")[2].strip()
    with pytest.raises(StoreError, match=folder):
        store.probe()


def test_folder_in_place_of_a_file_raises_store_error(tmp_path):
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
    """Limit the file size, so that a write fails midway, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_create_that_fails_midway_leaves_nothing(tmp_path):
    store = LocalStore(tmp_path)
    store.create("a/old", b"old")
    with files_limited_to(4096), pytest.raises(StoreError, match="EFBIG"):
        store.create("a/new", bytes(10_000))
    with files_limited_to(4096), pytest.raises(StoreError, match="EFBIG"):
        store.replace("a/old", bytes(10_000))
    assert store.read("a/old") == b"old"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["old"]


def test_put_that_fails_midway_raises_and_can_be_deleted(tmp_path):
    store = LocalStore(tmp_path)
    with files_limited_to(4096), pytest.raises(StoreError, match="EFBIG"):
        put(store, "a/shard", bytes(6000))
    store.delete(["a/shard"])
    assert list(tmp_path.iterdir()) == []


def test_entries_lists_dangling_link_as_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "there").symlink_to("folder")
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "gone").symlink_to("nothing")
    assert LocalStore(tmp_path).entries("") == ["folder/", "gone", "itself", "there/"]
