"""Retention: which checkpoints a run keeps."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.faulty_stores import FaultyStore
from support.savers import save_step, saver_on, steps_on
from support.timelines import start

from trainer import checkpoint
from trainer.checkpoint import lineage
from trainer.checkpoint.state_tree import Content
from trainer.core import intervals
from trainer.core.state import State
from trainer.storage import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> FaultyStore:
    return FaultyStore(tmp_path)


@pytest.mark.parametrize(
    ("keep_last", "expected"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5]), (0, [5])]
)
def test_retention_keeps_newest_checkpoints(store, keep_last, expected):
    saver = saver_on(store, keep_last=keep_last)
    for step in range(1, 6):
        save_step(saver, step)
    assert steps_on(store) == expected
    folders = {key.split("/")[1] for key in store.list("checkpoints")}
    assert len(folders) == len(expected)


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 3)])
def test_retention_keeps_best_checkpoint(store, mode, best):
    saver = saver_on(store, keep_last=1, keep_best=1, metric="score", mode=mode)
    for step, score in enumerate((0.5, 0.9, 0.1, 0.4, 0.6), start=1):
        save_step(saver, step, score=score, loss=-score)
    assert steps_on(store) == [best, 5]


def test_retention_without_metric_ignores_keep_best(store):
    saver = saver_on(store, keep_last=1, keep_best=3)
    for step in range(1, 4):
        save_step(saver, step, score=1.0 / step)
    assert steps_on(store) == [3]


def test_retention_ignores_metric_of_earlier_evaluation(store):
    saver = saver_on(store, keep_last=1, keep_best=1, metric="score")
    save_step(saver, 1, score=0.3)
    state = State(step=2, last_eval_step=1, metrics={"score": 0.9})  # an earlier result
    saver.save(state, lambda: Content(objects={"run": state.state_dict()}))
    save_step(saver, 3)
    assert steps_on(store) == [1, 3]


def test_retention_never_ranks_nan_best(store):
    saver = saver_on(store, keep_last=1, keep_best=1, metric="score")
    for step, score in enumerate((math.nan, 0.2, math.nan, 0.1, math.nan), start=1):
        save_step(saver, step, score=score)
    assert steps_on(store) == [2, 5]


def test_retention_ranks_checkpoints_of_earlier_attempts(store):
    first = saver_on(store, keep_last=1, keep_best=1, metric="score")
    for step, score in ((1, 0.9), (2, 0.1)):
        save_step(first, step, score=score)
    second = saver_on(store, start(store, 2), keep_last=1, keep_best=1, metric="score")
    for step, score in ((3, 0.2), (4, 0.3)):
        save_step(second, step, score=score)
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
        save_step(saver, step, **({} if score is None else {"m": score}))
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
        save_step(first, step, score=0.1 * step)
    folder = checkpoint.steps(store)[1].folder
    store.replace(f"{folder}/manifest.json", b"{ altered " * 20)
    messages: list[str] = []
    second = saver_on(
        store, start(store, 3), keep_last=2, keep_best=1, metric="score", log=messages.append
    )
    for step in (4, 5):
        assert save_step(second, step, score=0.01)
    assert {3, 4, 5} <= set(steps_on(store))
    assert 1 not in steps_on(store)
    assert messages == []


def test_retention_ignores_damaged_checkpoint(store):
    saver = saver_on(store, keep_last=2)
    for step in (1, 2):
        save_step(saver, step)
    damaged = checkpoint.steps(store)[0]
    lineage.mark_damaged(store, damaged, "test")
    for step in (3, 4):
        save_step(saver, step)
    assert steps_on(store) == [3, 4]
    assert len(store.list(damaged.folder)) == 3


def test_save_deletes_orphaned_files_of_earlier_attempts(store):
    first = saver_on(store)
    save_step(first, 1)
    store.create("checkpoints/step-00000002.0001/shard", bytes(100))
    second = saver_on(store, start(store, 1))
    save_step(second, 2)
    assert "checkpoints/step-00000002.0001/shard" not in store.list("checkpoints")
    assert steps_on(store) == [1, 2]


def test_saver_keeps_checkpoints_selected_by_intervals(store):
    """The saver applies `intervals.stale` without further rules."""
    scores = {1: 0.3, 2: 0.9, 3: 0.5, 4: 0.7, 5: 0.1}
    saver = saver_on(store, keep_last=9, metric="m")
    for step, score in scores.items():
        save_step(saver, step, m=score)
    last = saver_on(store, start(store, 5), keep_last=2, keep_best=2, metric="m", mode="max")
    save_step(last, 6, m=0.0)
    stale = intervals.stale({**scores, 6: 0.0}, keep_last=2, keep_best=2, mode="max")
    assert steps_on(store) == sorted({*scores, 6} - set(stale)) == [2, 4, 5, 6]
