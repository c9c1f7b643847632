"""Saver: intervals, retention and failed saves."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.faulty_stores import FaultyStore
from support.savers import a_saver_for

from trainer import checkpoint
from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import Attempt, Commit
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.state_tree import Content
from trainer.core import intervals
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.errors import CheckpointError, StoreError, SupersededError
from trainer.storage import LocalStore

RETENTION = ("keep_last", "keep_best", "keep_every_steps", "metric", "mode")


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def start(store: LocalStore, step: int = 0) -> Attempt:
    attempt = lineage.begin(store, {})
    lineage.amend(store, attempt, {"resumed_from": {"step": step}})
    return attempt


def saver_on(store: LocalStore, attempt: Attempt | None = None, **more: Any) -> Saver:
    more = {"log": lambda text: None, "every": Every(steps=1), "config": {"seed": 5}, **more}
    attempt = attempt or start(store)
    limits = {key: more.pop(key) for key in RETENTION if key in more}
    return a_saver_for(store, attempt, retention=Retention(store, attempt, **limits), **more)


def save(saver: Saver, step: int, **metrics: float) -> bool:
    """Save a step; `metrics` are the results of an evaluation at this step."""
    state = State(step=step, samples=8 * step, cursor={"epoch": step // 4, "batch": step % 4})
    if metrics:
        state.last_eval_step, state.metrics = step, metrics
    content = Content(
        tensors={"w": torch.full((9,), float(step))}, objects={"run": state.state_dict()}
    )
    return saver.save(state, lambda: content)


def steps_on(store: LocalStore) -> list[int]:
    return [commit.step for commit in checkpoint.steps(store)]


@pytest.fixture
def store(tmp_path: Path) -> FaultyStore:
    return FaultyStore(tmp_path)


# --- saving ------------------------------------------------------------------------------------


def test_save_commits_position_metrics_and_config(store):
    saver = saver_on(store)
    assert saver.committed_step is None
    assert save(saver, 6, accuracy=0.5)
    assert saver.committed_step == 6
    latest = checkpoint.latest(store)
    assert (latest.step, latest.epoch, latest.samples, latest.config) == (6, 1, 48, {"seed": 5})
    assert latest.objects["run"]["metrics"] == {"accuracy": 0.5}


def test_save_skips_committed_step(store):
    saver = saver_on(store)
    save(saver, 6)
    before = {key: store.read(key) for key in store.list("")}
    store.broken = ("put",)
    assert save(saver, 6)
    assert {key: store.read(key) for key in store.list("")} == before


def test_save_skips_resumed_step(store):
    saver = saver_on(store, resumed_step=6)
    assert save(saver, 6)
    assert steps_on(store) == []
    assert save(saver, 7)
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
    assert [save(saver, step) for step in (1, 2, 3)] == [True, False, True]
    assert calls == [[], [1], [1]]
    assert steps_on(store) == [1, 3]


# --- the clock ---------------------------------------------------------------------------------


def test_due_by_clock_after_interval(store):
    clock = Clock()
    saver = saver_on(store, every_s=60, clock=clock)
    assert not saver.due_by_clock()
    clock.now_s += 59.9
    assert not saver.due_by_clock()
    clock.now_s += 0.1
    assert saver.due_by_clock()
    save(saver, 1)
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
    assert not save(saver, 1)
    assert not saver.due_by_clock()


def test_due_by_clock_ignores_skipped_save(store):
    clock = Clock()
    saver = saver_on(store, every_s=60, clock=clock)
    save(saver, 1)
    clock.now_s += 60
    save(saver, 1)
    assert saver.due_by_clock()


# --- retention --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep_last", "expected"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5]), (0, [5])]
)
def test_retention_keeps_newest_checkpoints(store, keep_last, expected):
    saver = saver_on(store, keep_last=keep_last)
    for step in range(1, 6):
        save(saver, step)
    assert steps_on(store) == expected
    folders = {key.split("/")[1] for key in store.list("checkpoints")}
    assert len(folders) == len(expected)


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 3)])
def test_retention_keeps_best_checkpoint(store, mode, best):
    saver = saver_on(store, keep_last=1, keep_best=1, metric="score", mode=mode)
    for step, score in enumerate((0.5, 0.9, 0.1, 0.4, 0.6), start=1):
        save(saver, step, score=score, loss=-score)
    assert steps_on(store) == [best, 5]


def test_retention_without_metric_ignores_keep_best(store):
    saver = saver_on(store, keep_last=1, keep_best=3)
    for step in range(1, 4):
        save(saver, step, score=1.0 / step)
    assert steps_on(store) == [3]


def test_retention_ignores_metric_of_earlier_evaluation(store):
    saver = saver_on(store, keep_last=1, keep_best=1, metric="score")
    save(saver, 1, score=0.3)
    state = State(step=2, last_eval_step=1, metrics={"score": 0.9})  # an earlier result
    saver.save(state, lambda: Content(objects={"run": state.state_dict()}))
    save(saver, 3)
    assert steps_on(store) == [1, 3]


def test_retention_never_ranks_nan_best(store):
    saver = saver_on(store, keep_last=1, keep_best=1, metric="score")
    for step, score in enumerate((math.nan, 0.2, math.nan, 0.1, math.nan), start=1):
        save(saver, step, score=score)
    assert steps_on(store) == [2, 5]


def test_retention_ranks_checkpoints_of_earlier_attempts(store):
    first = saver_on(store, keep_last=1, keep_best=1, metric="score")
    for step, score in ((1, 0.9), (2, 0.1)):
        save(first, step, score=score)
    second = saver_on(store, start(store, 2), keep_last=1, keep_best=1, metric="score")
    for step, score in ((3, 0.2), (4, 0.3)):
        save(second, step, score=score)
    assert steps_on(store) == [1, 4]


@settings(max_examples=15, deadline=None)
@given(
    scores=st.lists(st.none() | st.integers(0, 3), min_size=1, max_size=6),
    keep_last=st.integers(1, 3),
    keep_best=st.integers(0, 3),
    mode=st.sampled_from(["max", "min"]),
    restart_at=st.integers(0, 6),
)
def test_retention_keeps_newest_and_best_over_restarts(
    tmp_path_factory, scores, keep_last, keep_best, mode, restart_at
):
    store = LocalStore(tmp_path_factory.mktemp("run"))
    keep = {"keep_last": keep_last, "keep_best": keep_best, "metric": "m", "mode": mode}
    saver = saver_on(store, **keep)
    expected: list[int] = []
    for step, score in enumerate(scores, start=1):
        if step == restart_at:
            saver = saver_on(store, start(store, step - 1), **keep)
        save(saver, step, **({} if score is None else {"m": score}))
        expected.append(step)
        ranked = sorted(
            (one for one in expected if scores[one - 1] is not None),
            key=lambda one: (-scores[one - 1] if mode == "max" else scores[one - 1], one),
        )
        expected = sorted({*expected[-keep_last:], *ranked[:keep_best]})
        assert steps_on(store) == expected


def test_retention_survives_unreadable_manifest(store):
    first = saver_on(store, keep_last=9, metric="score")
    for step in (1, 2, 3):
        save(first, step, score=0.1 * step)
    folder = checkpoint.steps(store)[1].folder
    store.replace(f"{folder}/manifest.json", b"{ altered " * 20)
    messages: list[str] = []
    second = saver_on(
        store, start(store, 3), keep_last=2, keep_best=1, metric="score", log=messages.append
    )
    for step in (4, 5):
        assert save(second, step, score=0.01)
    assert {3, 4, 5} <= set(steps_on(store))
    assert 1 not in steps_on(store)
    assert messages == []


def test_retention_ignores_damaged_checkpoint(store):
    saver = saver_on(store, keep_last=2)
    for step in (1, 2):
        save(saver, step)
    damaged = checkpoint.steps(store)[0]
    lineage.mark_damaged(store, damaged, "test")
    for step in (3, 4):
        save(saver, step)
    assert steps_on(store) == [3, 4]
    assert len(store.list(damaged.folder)) == 3


def test_save_deletes_orphaned_files_of_earlier_attempts(store):
    first = saver_on(store)
    save(first, 1)
    store.create("checkpoints/step-00000002.0001/shard", bytes(100))
    second = saver_on(store, start(store, 1))
    save(second, 2)
    assert "checkpoints/step-00000002.0001/shard" not in store.list("checkpoints")
    assert steps_on(store) == [1, 2]


# --- failures ----------------------------------------------------------------------------------


def test_save_failure_is_logged_and_tolerated(store):
    messages: list[str] = []
    saver = saver_on(store, log=messages.append)
    save(saver, 1)
    store.broken = ("put",)
    assert not save(saver, 2)
    assert saver.committed_step == 1
    (text,) = messages
    for part in ("warning: saving step 2 failed", "1 consecutive", "the disk failed in put"):
        assert part in text
    store.broken = ()
    assert save(saver, 2)
    assert steps_on(store) == [1, 2]


def test_save_third_consecutive_failure_raises(store):
    saver = saver_on(store)
    save(saver, 1)
    store.broken = ("put",)
    assert [save(saver, 2), save(saver, 3)] == [False, False]
    with pytest.raises(StoreError, match="the disk failed"):
        save(saver, 4)
    assert steps_on(store) == [1]


def test_save_success_resets_failure_count(store):
    saver = saver_on(store)
    for step in range(0, 12, 3):
        store.broken = ("put",)
        assert not save(saver, step + 1)
        assert not save(saver, step + 2)
        store.broken = ()
        assert save(saver, step + 3)


def test_save_skipped_step_keeps_failure_count(store):
    saver = saver_on(store)
    save(saver, 1)
    store.broken = ("put",)
    assert not save(saver, 2)
    assert not save(saver, 3)
    assert save(saver, 1)
    with pytest.raises(StoreError):
        save(saver, 4)


def test_save_with_stop_on_error_raises_at_first_failure(store):
    saver = saver_on(store, stop_on_error=True)
    store.broken = ("put",)
    with pytest.raises(StoreError, match="the disk failed"):
        save(saver, 1)


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
    save(saver, 1)
    lineage.begin(store, {})
    with pytest.raises(SupersededError):
        save(saver, 2)
    assert steps_on(store) == [1]


@pytest.mark.parametrize("stop_on_error", [False, True])
def test_save_commits_when_expired_checkpoints_cannot_be_deleted(store, stop_on_error):
    messages: list[str] = []
    saver = saver_on(store, keep_last=1, stop_on_error=stop_on_error, log=messages.append)
    save(saver, 1)
    store.broken = ("delete",)
    for step in (2, 3, 4, 5):
        assert save(saver, step)
        assert saver.committed_step == step
    assert len(messages) == 4
    assert all("the disk failed in delete" in text for text in messages)
    store.broken = ()
    assert save(saver, 6)
    assert steps_on(store) == [6]


@pytest.mark.parametrize("after", [False, True])
def test_save_failure_of_any_store_call_keeps_checkpoints_intact(tmp_path, after):
    def prepared(name: str, fail_at: int) -> tuple[LocalStore, FaultyStore, Saver]:
        store = LocalStore(tmp_path / name)
        first = saver_on(store, keep_last=3)
        for step in (1, 2, 3):
            save(first, step)
        store.create("checkpoints/step-00000004.0001/shard", bytes(100))
        attempt = start(store, 3)
        failing = FaultyStore(store.url, fail_at, "after" if after else "before")
        return store, failing, saver_on(failing, attempt, keep_last=1)

    _, counting, saver = prepared("counted", 0)
    assert save(saver, 4)
    assert len(counting.calls) >= 12
    for n in range(1, len(counting.calls) + 1):
        store, _, saver = prepared(str(n), n)
        done = save(saver, 4)
        commits = lineage.commits(store)
        assert commits[-1].step == 4 or (not done and commits[-1] == Commit(
            3, 1, "checkpoints/step-00000003.0001"
        ))  # fmt: skip
        for commit in commits:
            checkpoint.verify(store, lineage.read_manifest(store, commit))
        assert save(saver, 5)
        assert steps_on(store) == [5]


def test_saver_keeps_checkpoints_selected_by_intervals(store):
    """The saver applies `intervals.stale` without further rules."""
    scores = {1: 0.3, 2: 0.9, 3: 0.5, 4: 0.7, 5: 0.1}
    saver = saver_on(store, keep_last=9, metric="m")
    for step, score in scores.items():
        save(saver, step, m=score)
    last = saver_on(store, start(store, 5), keep_last=2, keep_best=2, metric="m", mode="max")
    save(last, 6, m=0.0)
    stale = intervals.stale({**scores, 6: 0.0}, keep_last=2, keep_best=2, mode="max")
    assert steps_on(store) == sorted({*scores, 6} - set(stale)) == [2, 4, 5, 6]
