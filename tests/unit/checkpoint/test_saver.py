"""Saver: intervals and failed saves."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faulty_stores import FaultyStore
from support.savers import save_step, saver_on, steps_on
from support.timelines import start

from trainer import checkpoint
from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import Commit
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.state_tree import Content
from trainer.core.state import State
from trainer.errors import CheckpointError, StoreError, SupersededError
from trainer.storage import LocalStore


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def store(tmp_path: Path) -> FaultyStore:
    return FaultyStore(tmp_path)


# --- saving --------------------------------------------------------------------------------------


def test_save_commits_position_metrics_and_config(store):
    saver = saver_on(store)
    assert saver.committed_step is None
    assert save_step(saver, 6, accuracy=0.5)
    assert saver.committed_step == 6
    latest = checkpoint.latest(store)
    assert (latest.step, latest.epoch, latest.samples, latest.config) == (6, 1, 48, {"seed": 5})
    assert latest.objects["run"]["metrics"] == {"accuracy": 0.5}


def test_save_skips_committed_step(store):
    saver = saver_on(store)
    save_step(saver, 6)
    before = {key: store.read(key) for key in store.list("")}
    store.broken = ("put",)
    assert save_step(saver, 6)
    assert {key: store.read(key) for key in store.list("")} == before


def test_save_skips_resumed_step(store):
    saver = saver_on(store, resumed_step=6)
    assert save_step(saver, 6)
    assert steps_on(store) == []
    assert save_step(saver, 7)
    assert steps_on(store) == [7]


def test_saved_hook_receives_committed_saves_only(store):
    saves: list[dict[str, Any]] = []
    clock = Clock()
    saver = saver_on(store, saved=saves.append, clock=clock)

    def collect() -> Content:
        clock.now_s += 3.0  # training waits for this
        return Content(tensors={"w": torch.zeros(9)}, objects={"run": {}})

    for step in (6, 7):
        before_s = time.time() - 3.0
        store.broken = ("put",) if step == 6 else ()
        saver.save(State(step=step), collect)
        assert [save["step"] for save in saves] == [7][: step - 6]
    (save,) = saves
    sizes = [store.size(key) for key in store.list("checkpoints") if "safetensors" in key]
    assert save.keys() == {"step", "attempt", "time", "save_s", "stall_s", "bytes"}
    assert (save["attempt"], [save["bytes"]]) == (1, sizes)
    assert before_s - 0.01 <= save["time"] <= time.time() - 3.0 + 0.01
    assert save["stall_s"] >= 3.0
    assert save["save_s"] > 0


def test_before_commit_failure_fails_the_save(store):
    calls: list[list[int]] = []

    def flush() -> None:
        calls.append(steps_on(store))
        if len(calls) == 2:
            raise StoreError("cannot flush")

    saver = saver_on(store, before_commit=flush)
    assert [save_step(saver, step) for step in (1, 2, 3)] == [True, False, True]
    assert calls == [[], [1], [1]]
    assert steps_on(store) == [1, 3]


# --- the clock -----------------------------------------------------------------------------------


def test_due_by_clock_after_interval(store):
    clock = Clock()
    saver = saver_on(store, every_s=60, clock=clock)
    assert not saver.due_by_clock()
    clock.now_s += 59.9
    assert not saver.due_by_clock()
    clock.now_s += 0.1
    assert saver.due_by_clock()
    save_step(saver, 1)
    assert not saver.due_by_clock()
    clock.now_s += 60
    assert saver.due_by_clock()


def test_due_by_clock_without_interval_is_false(store):
    clock = Clock()
    saver = saver_on(store, clock=clock)
    clock.now_s += 1e9
    assert not saver.due_by_clock()


def test_due_by_clock_restarts_after_failed_save(store):
    clock = Clock()
    saver = saver_on(store, every_s=60, clock=clock)
    clock.now_s += 60
    store.broken = ("put",)
    assert not save_step(saver, 1)
    assert not saver.due_by_clock()


def test_due_by_clock_ignores_skipped_save(store):
    clock = Clock()
    saver = saver_on(store, every_s=60, clock=clock)
    save_step(saver, 1)
    clock.now_s += 60
    save_step(saver, 1)
    assert saver.due_by_clock()


# --- failures ------------------------------------------------------------------------------------


def test_save_failure_is_logged_and_tolerated(store):
    messages: list[str] = []
    saver = saver_on(store, log=messages.append)
    save_step(saver, 1)
    store.broken = ("put",)
    assert not save_step(saver, 2)
    assert saver.committed_step == 1
    (text,) = messages
    for part in ("warning: saving step 2 failed", "1 consecutive", "the disk failed in put"):
        assert part in text
    store.broken = ()
    assert save_step(saver, 2)
    assert steps_on(store) == [1, 2]


def test_save_third_consecutive_failure_raises(store):
    saver = saver_on(store)
    save_step(saver, 1)
    store.broken = ("put",)
    assert [save_step(saver, 2), save_step(saver, 3)] == [False, False]
    with pytest.raises(StoreError, match="the disk failed"):
        save_step(saver, 4)
    assert steps_on(store) == [1]


def test_save_success_resets_failure_count(store):
    saver = saver_on(store)
    for step in range(0, 12, 3):
        store.broken = ("put",)
        assert not save_step(saver, step + 1)
        assert not save_step(saver, step + 2)
        store.broken = ()
        assert save_step(saver, step + 3)


def test_save_skipped_step_keeps_failure_count(store):
    saver = saver_on(store)
    save_step(saver, 1)
    store.broken = ("put",)
    assert not save_step(saver, 2)
    assert not save_step(saver, 3)
    assert save_step(saver, 1)
    with pytest.raises(StoreError):
        save_step(saver, 4)


def test_save_with_stop_on_error_raises_at_first_failure(store):
    saver = saver_on(store, stop_on_error=True)
    store.broken = ("put",)
    with pytest.raises(StoreError, match="the disk failed"):
        save_step(saver, 1)


def test_save_unsupported_value_fails(store):
    messages: list[str] = []
    saver = saver_on(store, log=messages.append)
    state = State(step=1)
    assert not saver.save(state, lambda: Content(objects={"run": {}, "odd": object()}))
    assert "objects.odd is a builtins.object" in messages[0]
    with pytest.raises(CheckpointError):
        saver_on(store, stop_on_error=True).save(state, lambda: Content(objects={"odd": object()}))


def test_save_superseded_attempt_raises(store):
    saver = saver_on(store)
    save_step(saver, 1)
    lineage.begin(store, {})
    with pytest.raises(SupersededError):
        save_step(saver, 2)
    assert steps_on(store) == [1]


@pytest.mark.parametrize("stop_on_error", [False, True])
def test_save_commits_when_expired_checkpoints_cannot_be_deleted(store, stop_on_error):
    messages: list[str] = []
    saver = saver_on(store, keep_last=1, stop_on_error=stop_on_error, log=messages.append)
    save_step(saver, 1)
    store.broken = ("delete",)
    for step in (2, 3, 4, 5):
        assert save_step(saver, step)
        assert saver.committed_step == step
    assert len(messages) == 4
    assert all("the disk failed in delete" in text for text in messages)
    store.broken = ()
    assert save_step(saver, 6)
    assert steps_on(store) == [6]


@pytest.mark.parametrize("after", [False, True])
def test_save_failure_of_any_store_call_keeps_checkpoints_intact(tmp_path, after):
    def prepared(name: str, fail_at: int) -> tuple[LocalStore, FaultyStore, Saver]:
        store = LocalStore(tmp_path / name)
        first = saver_on(store, keep_last=3)
        for step in (1, 2, 3):
            save_step(first, step)
        store.create("checkpoints/step-00000004.0001/shard", bytes(100))
        attempt = start(store, 3)
        failing = FaultyStore(store.url, fail_at, "after" if after else "before")
        return store, failing, saver_on(failing, attempt, keep_last=1)

    _, counting, saver = prepared("counted", 0)
    assert save_step(saver, 4)
    assert len(counting.calls) >= 12
    for n in range(1, len(counting.calls) + 1):
        store, _, saver = prepared(str(n), n)
        done = save_step(saver, 4)
        commits = lineage.commits(store)
        assert commits[-1].step == 4 or (not done and commits[-1] == Commit(
            3, 1, "checkpoints/step-00000003.0001"
        ))  # fmt: skip
        for commit in commits:
            checkpoint.verify(store, lineage.read_manifest(store, commit))
        assert save_step(saver, 5)
        assert steps_on(store) == [5]
