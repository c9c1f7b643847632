"""Simulated power cuts at any moment of saving, and recovery from the resulting disks.

Every file system operation is recorded. For each moment, the test builds disks that POSIX allows
after a power cut: data without fsync is complete, torn, zero or missing; names whose folder was
not fsynced exist or not, independently. On each disk the newest checkpoint must be intact, and no
older than the newest save that returned.
"""

import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.savers import a_saver_for

from trainer import checkpoint
from trainer.checkpoint import lineage
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.state_tree import Content
from trainer.core.state import State
from trainer.errors import PerdureError
from trainer.storage import LocalStore, Store, local

PART_BYTES = 8192  # so that a small shard has several parts
WORDS = 4500


# --- recording -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrote:
    """Bytes written to a file; durable at its next `Synced`, possibly earlier."""

    file: int
    start: int
    data: bytes


@dataclass(frozen=True)
class Synced:
    """fsync of a file's data or of a folder's names."""

    of: int | str


@dataclass(frozen=True)
class Named:
    """Atomic change of a folder's names: each maps to a file number, `FOLDER` or None."""

    folder: str
    names: dict[str, int | str | None]


@dataclass(frozen=True)
class Returned:
    """Return of a save: this step was reported as committed."""

    step: int


FOLDER = "folder"


class Recorder:
    """Serializes and records all file system calls below `root`."""

    def __init__(self, root: Path) -> None:
        self.log: list[Wrote | Synced | Named | Returned] = []
        self._root = str(root)
        self._files: dict[int, int] = {}  # inode to number; unlike inodes, numbers are unique
        self._count = 0
        self._lock = threading.RLock()

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("open", "pwrite", "fsync", "link", "rename", "unlink", "mkdir", "rmdir"):
            monkeypatch.setattr(
                os, name, self._recording(getattr(self, f"_{name}"), getattr(os, name))
            )
        monkeypatch.setattr(local, "open", self._open_file, raising=False)

    def _recording(self, note: Callable[..., None], do: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            with self._lock:
                result = do(*arguments, **more)
                note(result, *arguments)
                return result

        return call

    def _relative(self, path: Any) -> tuple[str, str] | None:
        folder, name = os.path.split(os.path.abspath(path))
        below = folder == self._root or folder.startswith(self._root + "/")
        return (os.path.relpath(folder, self._root), name) if below else None

    def _new_file(self, path: Any) -> None:
        if location := self._relative(path):
            self._count += 1
            self._files[os.stat(path).st_ino] = self._count
            self.log.append(Named(location[0], {location[1]: self._count}))

    def _open_file(self, path: Any, mode: str = "r", **more: Any) -> Any:
        with self._lock:
            file = open(path, mode, **more)  # noqa: SIM115
            if "x" in mode:
                self._new_file(path)
            return file

    def _open(self, result: int, path: Any, flags: int, *mode: int) -> None:
        if flags & os.O_CREAT:
            self._new_file(path)

    def _pwrite(self, result: int, descriptor: int, data: Any, start: int) -> None:
        if file := self._files.get(os.fstat(descriptor).st_ino):
            self.log.append(Wrote(file, start, bytes(data[:result])))

    def _fsync(self, result: None, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path == self._root:
            self.log.append(Synced("."))
        elif location := self._relative(path):
            is_folder = os.path.isdir(path)
            number = self._files.get(os.fstat(descriptor).st_ino, 0)
            self.log.append(Synced(os.path.normpath("/".join(location)) if is_folder else number))

    def _link(self, result: None, source: Any, target: Any) -> None:
        self._name(target, self._files[os.stat(target).st_ino])

    def _rename(self, result: None, source: Any, target: Any) -> None:
        old, new = self._relative(source), self._relative(target)
        assert old
        assert new
        assert old[0] == new[0]
        number = self._files[os.stat(target).st_ino]
        self.log.append(Named(new[0], {old[1]: None, new[1]: number}))

    def _unlink(self, result: None, path: Any) -> None:
        self._name(path, None)

    def _mkdir(self, result: None, path: Any, mode: int = 0o777) -> None:
        self._name(path, FOLDER)

    def _rmdir(self, result: None, path: Any) -> None:
        self._name(path, None)

    def _name(self, path: Any, target: int | str | None) -> None:
        if location := self._relative(path):
            self.log.append(Named(location[0], {location[1]: target}))


# --- disks after a power cut ---------------------------------------------------------------------


@dataclass
class Disk:
    """Durable and pending file data and names."""

    data: dict[int, list[Wrote]] = field(default_factory=dict)
    pending_data: dict[int, list[Wrote]] = field(default_factory=dict)
    names: dict[str, dict[str, int | str]] = field(default_factory=dict)
    pending_names: dict[str, list[Named]] = field(default_factory=dict)
    returned: int | None = None

    def apply(self, entry: Wrote | Synced | Named | Returned) -> None:
        match entry:
            case Wrote(file):
                self.pending_data.setdefault(file, []).append(entry)
            case Named(folder):
                self.pending_names.setdefault(folder, []).append(entry)
            case Synced(str(folder)):
                for change in self.pending_names.pop(folder, []):
                    _rename_in(self.names.setdefault(folder, {}), change)
            case Synced(int(file)):
                self.data.setdefault(file, []).extend(self.pending_data.pop(file, []))
            case Returned(step):
                self.returned = step

    def after_a_cut(self, root: Path, data_survives: "Fate", name_survives: "Fate") -> None:
        """Create the directory as it exists after the power cut."""
        self._make(root, ".", data_survives, name_survives)

    def _make(self, path: Path, folder: str, data: "Fate", name: "Fate") -> None:
        path.mkdir()
        names = dict(self.names.get(folder, {}))
        for change in self.pending_names.get(folder, []):
            if name():
                _rename_in(names, change)
        for entry, target in names.items():
            if isinstance(target, str):
                self._make(path / entry, os.path.normpath(f"{folder}/{entry}"), data, name)
            else:
                (path / entry).write_bytes(self._content(target, data))

    def _content(self, file: int, survives: "Fate") -> bytes:
        content = bytearray()
        for durable, writes in ((True, self.data), (False, self.pending_data)):
            for write in writes.get(file, []):
                fraction = 1.0 if durable else survives()
                survived = write.data[: int(len(write.data) * fraction)]
                stop = write.start + (
                    len(write.data) if fraction else 0
                )  # the size is written before the data
                content.extend(bytes(max(stop - len(content), 0)))
                content[write.start : write.start + len(survived)] = survived
        return bytes(content)


Fate = Callable[[], float]
"""Returns the surviving fraction of a write; a name survives if it is not 0."""


def _rename_in(names: dict[str, int | str], change: Named) -> None:
    for name, target in change.names.items():
        if target is None:
            names.pop(name, None)
        else:
            names[name] = target


def fates() -> Iterator[tuple[Fate, Fate]]:
    """Yield survival functions for data and names: all or nothing, then random."""
    for data in (0.0, 1.0):
        for name in (0.0, 1.0):
            yield lambda data=data: data, lambda name=name: name
    for seed in range(4):
        lot = random.Random(seed)
        yield lambda lot=lot: lot.choice([0.0, 0.4, 1.0]), lambda lot=lot: lot.choice([0.0, 1.0])


# --- the recorded scenario -----------------------------------------------------------------------


def content_of(step: int) -> Content:
    tensor = torch.arange(float(WORDS)) + step
    return Content(tensors={"w": tensor}, objects={"run": State(step=step).state_dict()})


def saves_with_pruning(root: Path, returned: Callable[[int], None]) -> None:
    """Save and prune in one attempt, then resume, save and clean up orphaned files in the next."""
    store = LocalStore(root)
    first = lineage.begin(store, {"host": "a"})
    lineage.amend(store, first, {"resumed_from": None})
    saver = saver_on(store, first)
    for step in (1, 2):
        assert saver.save(State(step=step), partial(content_of, step))
        returned(step)
    orphan = store._new_file("checkpoints/step-00000003.0001/shard.safetensors", PART_BYTES)
    orphan.put((0, memoryview(bytes(PART_BYTES))))
    second = lineage.begin(store, {"host": "b"})
    lineage.amend(store, second, {"resumed_from": {"step": 2, "attempt": 1}})
    saver = saver_on(store, second)
    assert saver.save(State(step=3), partial(content_of, 3))
    returned(3)
    assert [commit.step for commit in checkpoint.steps(store)] == [3]


def saver_on(store: LocalStore, attempt: lineage.Attempt) -> Saver:
    retention = Retention(store, attempt, keep_last=1)
    return a_saver_for(store, attempt, retention=retention)


def problems(root: Path, disk: Disk) -> str | None:
    """Return the first problem with the checkpoints on a disk, or None."""
    store, newest = LocalStore(root), None
    try:
        for commit in checkpoint.steps(store):
            manifest = lineage.read_manifest(store, commit)
            checkpoint.verify(store, manifest)
            loaded = {"w": torch.zeros(WORDS)}
            checkpoint.load(store, manifest, loaded)
            if not torch.equal(loaded["w"], content_of(manifest.step).tensors["w"]):
                return f"step {manifest.step} holds other values"
            newest = manifest.step
    except (PerdureError, FileNotFoundError) as error:
        return f"{type(error).__name__}: {error}"
    if disk.returned and (newest is None or newest < disk.returned):
        return f"step {disk.returned} is lost; the newest is {newest}"
    return None


def all_problems(log: list[Any], folder: Path) -> list[str]:
    """Return the problems on all disks after a power cut at any moment."""
    failures, disk, count = [], Disk(), 0
    for moment in range(len(log) + 1):
        for number, (data, name) in enumerate(fates()):
            count += 1
            root = folder / f"disk-{count}"
            disk.after_a_cut(root, data, name)
            if problem := problems(root, disk):
                last = log[moment - 1] if moment else None
                failures.append(
                    f"moment {moment} ({type(last).__name__}), fate {number}: {problem}"
                )
        if moment < len(log):
            disk.apply(log[moment])
    return failures


def recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    root = folder / "run"
    root.mkdir()
    recorder = Recorder(root)
    with monkeypatch.context() as patched:
        patched.setattr(local.LocalStore, "part_bytes", PART_BYTES)
        recorder.patch(patched)
        saves_with_pruning(root, lambda step: recorder.log.append(Returned(step)))
    return recorder.log


def test_power_cut_at_any_moment_keeps_newest_checkpoint_intact(tmp_path, monkeypatch):
    log = recorded(tmp_path, monkeypatch)
    assert sum(isinstance(entry, Wrote) for entry in log) > 20
    assert sum(isinstance(entry, Returned) for entry in log) == 3
    assert all_problems(log, tmp_path) == []


# --- sensitivity of the simulation ---------------------------------------------------------------


@pytest.mark.parametrize("kind", [int, str])
def test_simulation_detects_missing_fsync(tmp_path, monkeypatch, kind):
    log = recorded(tmp_path, monkeypatch)
    broken = [e for e in log if not (isinstance(e, Synced) and isinstance(e.of, kind))]
    assert len(broken) < len(log)
    assert all_problems(broken, tmp_path)


def test_simulation_detects_manifest_deleted_last(tmp_path, monkeypatch):
    def delete(store: Store, folder: str) -> None:
        keys = store.list(folder)
        store.delete(sorted(keys, key=lambda key: key.endswith(lineage.MANIFEST)))

    monkeypatch.setattr(lineage, "delete", delete)
    assert all_problems(recorded(tmp_path, monkeypatch), tmp_path)
