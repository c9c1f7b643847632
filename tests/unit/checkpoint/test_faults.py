"""Full, read-only, slow, hanging or failing disks: training continues and nothing is lost."""

import errno
import gc
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.faulty_stores import FaultyStore, put
from support.savers import a_saver_for

from trainer import checkpoint
from trainer.checkpoint import lineage
from trainer.checkpoint.memory import HostBuffer
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.state_tree import Content
from trainer.core.state import State
from trainer.errors import SaveHangsError, StoreError
from trainer.storage import LocalStore, local

WORDS = 40_000


def content_of(step: int) -> Content:
    tensors = {"w": torch.full((WORDS,), float(step))}
    return Content(tensors=tensors, objects={"run": State(step=step).state_dict()})


class Job:
    """Step boundaries of one rank, as in the training loop, with a save at each one."""

    def __init__(self, store: LocalStore, keep_last: int = 2, **settings: Any) -> None:
        attempt = lineage.begin(store, {})
        lineage.amend(store, attempt, {"resumed_from": None})
        self.messages: list[str] = []
        self.now_s = 0.0
        self.saver = a_saver_for(
            store, attempt, log=self.messages.append,
            clock=lambda: self.now_s, retention=Retention(store, attempt, keep_last=keep_last),
            **settings,
        )  # fmt: skip

    def boundary(self, step: int, *, due: bool = True) -> None:
        self.saver.at_boundary(
            State(step=step), partial(content_of, step), due=due, ended=self.saver.ended()
        )

    def save(self, step: int) -> bool:
        return self.saver.save(State(step=step), partial(content_of, step))


def assert_intact(root: Path, *steps: int) -> None:
    """Assert that exactly these steps are committed and load their values."""
    store = LocalStore(root)
    assert [commit.step for commit in checkpoint.steps(store)] == list(steps)
    for commit in checkpoint.steps(store):
        manifest = lineage.read_manifest(store, commit)
        checkpoint.verify(store, manifest)
        loaded = {"w": torch.zeros(WORDS)}
        checkpoint.load(store, manifest, loaded)
        assert loaded["w"].unique().tolist() == [float(commit.step)]


def join_save_threads() -> None:
    """Wait for the threads of abandoned saves."""
    for thread in threading.enumerate():
        if thread.name.startswith("checkpoint-"):
            thread.join(60)
            assert not thread.is_alive()


# --- a store that hangs --------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["open_new", "put", "finish", "list", "create", "delete"])
def test_hanging_store_blocks_training_only_after_timeout(tmp_path, call):
    store = FaultyStore(tmp_path)
    job = Job(store, keep_last=1, timeout_s=100.0)
    assert job.save(1)
    store.hanging = (call,)
    for step in range(2, 50):
        job.boundary(step)  # waiting for the save would take minutes
    assert store.hangs.wait(60)
    committed = 2 if call == "delete" else 1  # pruning runs after the commit
    assert checkpoint.latest(LocalStore(tmp_path)).step == committed
    job.now_s += 100.0
    job.boundary(50)
    job.now_s += 0.1
    with pytest.raises(SaveHangsError, match=r"step 2 has not ended after 100 s "):
        job.boundary(51)
    store.released.set()
    join_save_threads()
    assert_intact(tmp_path, 2)  # an abandoned save commits a complete checkpoint or none


def test_slow_store_receives_only_newest_due_save(tmp_path):
    store = FaultyStore(tmp_path)
    job = Job(store, keep_last=100)
    store.hanging = ("put",)
    for step in range(1, 30):
        job.boundary(step)
    store.released.set()
    join_save_threads()
    job.boundary(30, due=False)
    join_save_threads()
    job.boundary(31, due=False)
    join_save_threads()
    assert_intact(tmp_path, 1, 30)
    assert job.messages == []


def test_save_without_enough_time_is_skipped_or_abandoned(tmp_path):
    store = FaultyStore(tmp_path)
    job = Job(store)
    assert job.save(1)
    job.saver.save_s = 5.0
    step_2 = partial(content_of, 2)
    assert not job.saver.save(State(step=2), step_2, within_s=4.9)
    assert job.messages.pop() == ("warning: step 2 is not saved: 5 s remain, but a save takes 5 s")
    assert "put" not in store.calls[store.calls.index("finish") + 1 :]
    store.hanging = ("put",)
    assert not job.saver.save(State(step=2), step_2, within_s=5.1)  # the clock is frozen
    assert "step 2 is not saved: the save has not ended" in job.messages.pop()
    store.released.set()
    join_save_threads()
    assert_intact(tmp_path, 1, 2)  # the abandoned save completed


def test_save_with_enough_time_succeeds(tmp_path):
    job = Job(LocalStore(tmp_path))
    assert job.saver.save(State(step=1), partial(content_of, 1), within_s=60.0)
    assert 0 < job.saver.save_s < 60
    assert job.messages == []


def test_save_longer_than_grace_time_warns_once(tmp_path):
    job = Job(LocalStore(tmp_path), grace_s=20.0)
    for save_s in (None, 19.0, 21.0, 25.0, 3.0, 22.0):
        job.saver.save_s = save_s
        job.saver.compare_with_grace()
    assert [text[:26] for text in job.messages] == [
        "warning: a save takes 21 s",
        "warning: a save takes 22 s",
    ]


# --- a store that fails --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh_process() -> Iterator[ProcessPoolExecutor]:
    """Yield a process without threads of earlier tests, such as mirrors that retry a copy."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("how", ["before", "torn", "after"])
def test_failed_saves_leak_no_thread_descriptor_buffer_or_file(tmp_path, fresh_process, how):
    fresh_process.submit(check_leaks, tmp_path, how).result()


def check_leaks(folder: Path, how: str) -> None:
    """Assert that thirty failing saves leave process and store unchanged."""
    store = FaultyStore(folder, how=how)
    job = Job(store, keep_last=1)
    assert job.save(1)
    before, files = resources(), LocalStore(folder).list("")
    assert before[2] > 0
    for step in range(2, 32):
        store.broken = (("open_new", "put", "finish", "list")[step % 4],)
        assert not job.save(step)
        assert len(job.messages) == step - 1  # one message per failure
        job.saver._failures = 0  # three consecutive failures would end the run
    assert resources() == before, (before, resources())
    assert LocalStore(folder).list("") == files
    store.broken = ()
    assert job.save(32)
    assert_intact(folder, 32)


def resources() -> tuple[int, int, int]:
    """Return the numbers of threads, open descriptors and buffers of this process."""
    join_save_threads()  # a save's result is there a moment before its thread ends
    gc.collect()
    buffers = sum(type(item) is HostBuffer for item in gc.get_objects())
    return threading.active_count(), len(os.listdir("/proc/self/fd")), buffers


def fails_once(do: Callable[..., Any], number: int) -> Callable[..., Any]:
    calls: list[int] = []

    def call(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(number, os.strerror(number))
        return do(*arguments)

    return call


@pytest.mark.parametrize("name", ["pwrite", "fsync", "link", "open"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EDQUOT])
def test_os_error_is_reported_and_next_save_succeeds(tmp_path, monkeypatch, name, number):
    job = Job(LocalStore(tmp_path))
    assert job.save(1)
    with monkeypatch.context() as patched:
        patched.setattr(os, name, fails_once(getattr(os, name), number))
        assert not job.save(2)
    assert len(job.messages) == 1
    assert "saving step 2 failed" in job.messages[0]
    assert errno.errorcode[number] in job.messages[0]
    assert str(tmp_path) in job.messages[0]
    assert_intact(tmp_path, 1)
    assert job.save(3)
    assert_intact(tmp_path, 1, 3)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_short_writes_and_reads_are_continued(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("cut")
    sizes = st.sampled_from([1, 511, 4096, 8192, 5000, 1 << 20])
    content = os.urandom(data.draw(st.integers(1, 40_000)))
    pwrite, preadv, lock = os.pwrite, os.preadv, threading.Lock()

    def limit() -> int:
        with lock:
            return data.draw(sizes)

    def write_less(descriptor: int, view: Any, start: int) -> int:
        return pwrite(descriptor, view[: limit()], start)

    def read_less(descriptor: int, views: Any, start: int) -> int:
        return preadv(descriptor, [view[: limit()] for view in views], start)

    buffer = HostBuffer(len(content), pinned=False)
    buffer.view[: len(content)] = content
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "pwrite", write_less)
        patched.setattr(os, "preadv", read_less)
        patched.setattr(local, "_DIRECT_READ_BYTES", 4096)
        store = LocalStore(root)
        file = store.open_new("shard", len(content))
        file.put(0, buffer.view[: len(content)])
        file.finish()
        target = HostBuffer(len(content), pinned=False)
        assert store.read_into("shard", 0, target.view[: len(content)]) == len(content)
    assert (root / "shard").read_bytes() == content
    assert bytes(target.view[: len(content)]) == content


# --- file systems that are full or read-only -----------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a mounted file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    )
    if not mounted:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.check_call(["umount", folder])


def test_full_disk_is_detected_before_writing(small_disk):
    job = Job(LocalStore(small_disk))
    assert job.save(1)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(800_000))
    files = LocalStore(small_disk).list("")
    assert not job.save(2)
    assert len(job.messages) == 1
    assert "it needs 16" in job.messages[0]
    assert (
        "bytes, 69,632 are free; free some space, or lower checkpoint.keep_last" in job.messages[0]
    )
    assert LocalStore(small_disk).list("") == files
    assert_intact(small_disk, 1)
    ballast.unlink()
    assert job.save(3)
    assert_intact(small_disk, 1, 3)


def test_disk_filling_after_space_check_fails_at_allocation(small_disk, monkeypatch):
    job = Job(LocalStore(small_disk))
    assert job.save(1)
    (small_disk / "ballast").write_bytes(bytes(800_000))
    roomy = os.statvfs("/proc/self")
    roomy = os.statvfs_result((4096, 4096, 9**9, 9**9, 9**9, *tuple(roomy)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: roomy)
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("something was written"))
    assert not job.save(2)
    assert "ENOSPC" in job.messages[0]
    assert_intact(small_disk, 1)


def test_read_only_disk_is_reported_and_loses_nothing(small_disk):
    job = Job(LocalStore(small_disk))
    assert job.save(1)
    subprocess.check_call(["mount", "-o", "remount,ro", small_disk])
    try:
        assert not job.save(2)
        assert_intact(small_disk, 1)
    finally:
        subprocess.check_call(["mount", "-o", "remount,rw", small_disk])
    assert "EROFS" in job.messages[0]
    assert "choose a run_dir that is not mounted read-only" in job.messages[0]
    assert job.save(3)
    assert_intact(small_disk, 1, 3)


def test_save_without_direct_io_succeeds(small_disk, monkeypatch):
    def open_buffered(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real_open(path, flags, *mode)

    real_open = os.open
    monkeypatch.setattr(os, "open", open_buffered)
    assert Job(LocalStore(small_disk)).save(1)
    assert_intact(small_disk, 1)


def test_third_consecutive_failure_ends_run_with_cause(small_disk):
    job = Job(LocalStore(small_disk))
    assert job.save(1)
    put(LocalStore(small_disk), "ballast", bytes(800_000))
    assert not job.save(2)
    assert not job.save(3)
    with pytest.raises(StoreError, match="are free"):
        job.save(4)
    assert_intact(small_disk, 1)
