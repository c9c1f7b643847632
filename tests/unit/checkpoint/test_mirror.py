"""Mirror store: copied checkpoints, skipped checkpoints and interrupted copies."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.savers import a_saver_for

from trainer import checkpoint
from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import Attempt
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.mirror import Mirror
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.shard_reader import ShardReader
from trainer.checkpoint.state_tree import Content
from trainer.checkpoint.writer import Writer
from trainer.cluster.world import World
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.errors import StoreError, SupersededError
from trainer.storage import LocalStore


class Gated(LocalStore):
    """A store whose uploads wait for a gate and fail while `is_down` is set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.gate, self.reached = threading.Event(), threading.Event()
        self.gate.set()
        self.is_down = False

    def write(self, key: str, total_bytes: int, parts: Any) -> None:
        self.reached.set()
        assert self.gate.wait(60)
        if self.is_down:
            raise StoreError("no route to the mirror")
        super().write(key, total_bytes, parts)


class Run:
    """Single-rank attempt with a run store and a mirror."""

    def __init__(self, folder: Path, keep_last: int = 9, mirror_keep_last: int = 9) -> None:
        self.source, self.target = LocalStore(str(folder / "run")), Gated(folder / "mirror")
        self.attempt = lineage.begin(self.source, {})
        lineage.create_record(self.target, self.attempt, {})
        for store in (self.source, self.target):
            lineage.amend(store, self.attempt, {"resumed_from": {"step": 0}})
        self.writer = Writer(self.source, World(), self.attempt)
        self.keep_last = keep_last
        self.mirror = self.new_mirror(mirror_keep_last)

    def new_mirror(self, keep_last: int = 9) -> Mirror:
        retention = Retention(self.target, self.attempt, keep_last=keep_last)
        return Mirror(
            self.source, self.target, World(), self.attempt,
            retention=retention, also=lambda: {"metrics.jsonl": b"{}\n"},
        )  # fmt: skip

    def save(self, step: int) -> Manifest:
        content = Content(
            tensors={"w": torch.full((400_000,), float(step)), "b": torch.arange(7)},
            objects={"run": State(step=step).state_dict()},
        )
        return checkpoint.save(self.writer, content, step=step)

    def copied(self) -> list[int]:
        """Return the steps in the mirror, after verifying each."""
        commits = lineage.commits(self.target)
        for commit in commits:
            checkpoint.verify(self.target, lineage.read_manifest(self.target, commit))
        return [commit.step for commit in commits]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def shard(store: LocalStore, manifest: Manifest) -> Path:
    return Path(store.url, "checkpoints", manifest.folder, next(iter(manifest.files)))


def test_mirror_copies_same_bytes_under_same_keys(run):
    run.mirror.submit(run.save(3))
    assert run.mirror.wait(None)
    keys = run.target.list("checkpoints")
    assert keys == run.source.list("checkpoints")
    assert all(run.target.read(key) == run.source.read(key) for key in keys)
    assert run.target.read("metrics.jsonl") == b"{}\n"
    assert run.copied() == [3]


def test_slow_mirror_copies_newest_checkpoint_next(run):
    run.target.gate.clear()
    run.mirror.submit(run.save(1))
    assert run.target.reached.wait(60)
    for step in range(2, 7):
        run.mirror.submit(run.save(step))
    assert not run.mirror.wait(0.0)
    run.target.gate.set()
    assert run.mirror.wait(None)
    assert run.copied() == [1, 6]


def test_submit_during_agreement_changes_nothing(run, monkeypatch):
    """Submit more checkpoints than the queue holds while the ranks agree."""
    first, *more = [run.save(step) for step in (1, 2, 3, 4)]
    agree = World.gather

    def gather(world: World, value: Any) -> list[Any]:
        while more:
            run.mirror.submit(more.pop(0))
        return agree(world, value)

    monkeypatch.setattr(World, "gather", gather)
    run.mirror = run.new_mirror()
    run.mirror.submit(first)
    assert run.mirror.wait(60)
    assert run.copied() == [1, 4]
    assert run.mirror.notes == []


def test_mirror_applies_its_retention(tmp_path):
    run = Run(tmp_path, mirror_keep_last=2)
    for step in range(1, 6):
        run.mirror.submit(run.save(step))
        assert run.mirror.wait(None)
    assert run.copied() == [4, 5]
    assert len(lineage.commits(run.source)) == 5


def test_failure_and_recovery_are_reported_once(run):
    run.target.is_down = True
    for step in (1, 2):
        run.mirror.submit(run.save(step))
        assert not run.mirror.wait(None)
    assert len(run.mirror.notes) == 1
    assert "the mirror is behind: step 1" in run.mirror.notes[0]
    assert "no route to the mirror" in run.mirror.notes[0]
    run.target.is_down = False
    assert run.mirror.wait(None)  # without a new checkpoint
    assert run.copied() == [2]
    assert run.mirror.notes[1:] == ["the mirror has step 2; it is no longer behind"]


def test_complete_shard_of_interrupted_copy_is_reused(run):
    manifest = run.save(1)
    partial = shard(run.target, manifest)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(shard(run.source, manifest).read_bytes())
    before = os.stat(partial)
    run.mirror.submit(manifest)
    assert run.mirror.wait(None)
    assert os.stat(partial).st_ino == before.st_ino
    assert os.stat(partial).st_mtime_ns == before.st_mtime_ns
    assert run.copied() == [1]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"?"])
def test_partial_shard_of_interrupted_copy_is_replaced(run, damage):
    manifest = run.save(1)
    partial = shard(run.target, manifest)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(damage(shard(run.source, manifest).read_bytes()))
    run.mirror.submit(manifest)
    assert run.mirror.wait(None)
    assert run.copied() == [1]


def test_damaged_source_is_not_copied(run):
    manifest = run.save(1)
    file = shard(run.source, manifest)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    run.mirror.submit(manifest)
    assert not run.mirror.wait(None)
    assert "checksum mismatch" in run.mirror.notes[0]
    assert run.target.list("checkpoints") == []


def test_checkpoint_in_mirror_is_not_copied_again(run):
    manifest = run.save(1)
    run.mirror.submit(manifest)
    assert run.mirror.wait(None)
    run.target.is_down = True
    again = run.new_mirror()
    again.submit(manifest)
    assert again.wait(None)


def test_void_folder_in_mirror_stays_void(run):
    manifest = run.save(1)
    key = f"checkpoints/{manifest.folder}/manifest.json"
    run.target.create(key, b'{"void": 2}')
    run.mirror.submit(manifest)
    assert not run.mirror.wait(None)
    assert run.target.read(key) == b'{"void": 2}'


# --- with the saver ------------------------------------------------------------------------------


def saver_of(run: Run) -> Saver:
    retention = Retention(run.source, run.attempt, keep_last=run.keep_last)
    return a_saver_for(
        run.source, run.attempt, every=Every(steps=1), retention=retention, mirror=run.mirror
    )


def content_of(step: int) -> Content:
    return Content(
        tensors={"w": torch.full((9,), float(step))},
        objects={"run": State(step=step).state_dict()},
    )


def pass_boundary(saver: Saver, step: int) -> None:
    """Save at a step's end, as the loop does, and wait until the save's thread has ended."""
    saver.at_boundary(State(step=step), lambda: content_of(step), due=True, ended=saver.ended())
    assert saver._flight is not None
    saver._flight.save.result(60)


def test_retention_keeps_checkpoints_waiting_for_copy(tmp_path):
    run = Run(tmp_path, keep_last=1)
    saver = saver_of(run)
    run.target.gate.clear()
    pass_boundary(saver, 1)
    assert run.target.reached.wait(60)
    for step in (2, 3, 4, 5):
        pass_boundary(saver, step)
    assert [c.step for c in lineage.commits(run.source)] == [1, 4, 5]  # 2 and 3 are never copied
    run.target.gate.set()
    assert run.mirror.wait(None)
    pass_boundary(saver, 6)
    assert run.mirror.wait(None)
    pass_boundary(saver, 7)
    assert [c.step for c in lineage.commits(run.source)][-1] == 7
    assert 1 not in [c.step for c in lineage.commits(run.source)]
    assert run.mirror.wait(None)
    assert run.copied()[0] == 1
    assert {5, 6, 7} <= set(run.copied())


def test_newer_attempt_in_mirror_supersedes_run(run):
    saver = saver_of(run)
    newer = lineage.begin(run.target, {"host": "node9", "pid": 7})
    pass_boundary(saver, 1)
    run.mirror.wait(60)
    assert isinstance(run.mirror.superseded, SupersededError)
    assert lineage.commits(run.target) == []
    with pytest.raises(SupersededError, match=f"attempt {newer.number} .* on node9"):
        saver.save(State(step=2), lambda: content_of(2))
    assert [c.step for c in lineage.commits(run.source)] == [1]


def test_final_save_copies_newest_within_remaining_time(run, capsys):
    saver = saver_of(run)
    run.target.gate.clear()
    assert saver.save(State(step=1), lambda: content_of(1), within_s=0.2)
    assert "step 1 is not copied to the mirror" in capsys.readouterr().out
    run.target.gate.set()
    assert saver.save(State(step=2), lambda: content_of(2))
    assert run.copied()[-1] == 2


# --- copying a file ------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 3_000_000), max_size=5),
    part_bytes=st.sampled_from([4096, 5000, 100_000, 1 << 20, 8 << 20]),
)
@settings(max_examples=25, deadline=None)
def test_parts_are_exact_for_any_part_size(tmp_path_factory, sizes, part_bytes):
    store = LocalStore(str(tmp_path_factory.mktemp("copy")))
    tensors = {
        f"t{n}": torch.randint(0, 255, (size,), dtype=torch.uint8) for n, size in enumerate(sizes)
    }
    attempt: Attempt = lineage.begin(store, {})
    manifest = checkpoint.save(Writer(store, World(), attempt), Content(tensors=tensors), step=1)
    name, record = next(iter(manifest.files.items()))
    parts = list(
        ShardReader(store, f"checkpoints/{manifest.folder}", manifest).parts(name, part_bytes)
    )
    assert b"".join(parts) == store.read(f"checkpoints/{manifest.folder}/{name}")
    assert {len(part) for part in parts[:-1]} <= {part_bytes}
    assert sum(map(len, parts)) == record.bytes
