"""TensorBoard's view of a killed and resumed run: every step once."""

import json
import shutil
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.event_files import data_server, multiplexed, scalars

from trainer.storage import open_store
from trainer.tracking import jsonl
from trainer.tracking.jsonl import Jsonl
from trainer.tracking.several import Several
from trainer.tracking.tensorboard import TensorBoard


def line(split, step, **metrics):
    position = {"step": step, "epoch": 0, "samples": step, "time": 1.5, "split": split}
    return {**position, **metrics}


def attempt(store, run_dir, number, *, step=0, last_eval_step=0, upload_every_s=300.0):
    tracker = Several([Jsonl(), TensorBoard(upload_every_s)])
    tracker.start({
        "run_dir": run_dir, "store": store, "attempt": number, "step": step,
        "last_eval_step": last_eval_step,
    })  # fmt: skip
    return tracker


def kill(tracker):
    """End an attempt as SIGKILL does: nothing is closed but what the interpreter complains of."""
    lines, board = tracker._trackers
    for file in (lines._lines, lines._saves):
        if hasattr(file, "_file"):
            file._file.close()
    board._file.close()
    if board._store is not None:
        shutil.rmtree(board._folder)


def expected(store):
    """The scalars of metrics.jsonl, as float32."""
    result = {}
    for one in jsonl.read(store):
        for key in one.keys() - {"step", "epoch", "samples", "time", "split"}:
            result.setdefault(f"{one['split']}/{key}", []).append((one["step"], one[key]))
    return result


def displayed(store, run_dir, folder):
    """TensorBoard's view of the run; for an object store, of the uploaded files."""
    if not run_dir.startswith("memory:"):
        return scalars(f"{run_dir}/tensorboard")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for key in store.list("tensorboard"):
        (folder / key.rpartition("/")[2]).write_bytes(store.read(key))
    return scalars(folder)


attempts = st.lists(
    st.tuples(
        st.integers(0, 4), st.integers(0, 3), st.booleans(), st.booleans(), st.integers(1, 3)
    ),
    max_size=5,
)


@pytest.mark.parametrize("kind", ["local", "memory"])
@given(attempts=attempts)
@settings(max_examples=25, deadline=None)
def test_every_step_is_shown_once_after_kills(tmp_path_factory, kind, attempts):
    """An attempt is: steps committed, steps lost, closed or not, checkpoint saved after the last
    evaluation or not, and the interval of lines."""
    folder = tmp_path_factory.mktemp("run")
    run_dir = str(folder) if kind == "local" else f"memory:/{folder}"
    store = open_store(run_dir)
    step = last_eval = 0
    for number, (committed, lost, closes, measured, every) in enumerate(
        [*attempts, (2, 0, 1, 1, 1)], 1
    ):
        tracker = attempt(store, run_dir, number, step=step, last_eval_step=last_eval)
        done = 0
        if last_eval < step:  # what is due is done first
            tracker.log(line("eval", step, loss=step / 4))
        for step_ in range(step + 1, step + committed + lost + 1):
            if step_ % every == 0:
                tracker.log(line("train", step_, loss=step_ / 8, lr=1.0))
            if step_ > step + committed or step_ < step + committed or measured:
                tracker.log(line("eval", step_, loss=step_ / 4))
                done = step_ if step_ <= step + committed else done
            if step_ == step + committed:
                tracker.flush()
        last_eval = max(last_eval, done, step if committed else last_eval)
        step += committed
        if closes and not lost:
            tracker.close()
        else:
            kill(tracker)
    assert displayed(store, run_dir, folder / "copy") == expected(store)
    if kind == "memory":
        assert store.list("tensorboard") == [
            f"tensorboard/events.out.tfevents.{number:010d}.perdure"
        ]


def test_events_are_in_the_file_when_log_returns(tmp_path):
    tracker = attempt(open_store(str(tmp_path)), str(tmp_path), 1)
    tracker.log(line("train", 5, loss=0.5, accuracy=None))
    result = scalars(tmp_path / "tensorboard")
    assert result["train/loss"] == [(5, 0.5)]
    assert str(result["train/accuracy"]) == "[(5, nan)]"
    tracker.close()


def test_tensorboard_added_later_shows_the_complete_run(tmp_path):
    store = open_store(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line("train", step, loss=0.5)) + "\n" for step in (1, 2, 3))
    )
    tracker = attempt(store, str(tmp_path), 2, step=2, last_eval_step=2)
    tracker.log(line("train", 3, loss=0.25))
    tracker.close()
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [(1, 0.5), (2, 0.5), (3, 0.25)]


def test_superseded_attempt_changes_nothing(tmp_path):
    store = open_store(str(tmp_path))
    dead = attempt(store, str(tmp_path), 1)
    dead.log(line("train", 1, loss=0.5))
    alive = attempt(store, str(tmp_path), 2, step=1, last_eval_step=1)
    dead.log(line("train", 2, loss=9.0))
    alive.log(line("train", 2, loss=0.25))
    dead.log(line("train", 3, loss=9.0))
    dead.close()
    alive.close()
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [(1, 0.5), (2, 0.25)]


def test_clocks_of_nodes_do_not_matter(tmp_path, monkeypatch):
    """A writer that names its files by clock fails here: readers sort event files by name."""
    store, now_s = open_store(str(tmp_path)), time.time()
    for number, behind_s in enumerate((0, 3600, 60), 1):
        monkeypatch.setattr(time, "time", lambda behind_s=behind_s: now_s - behind_s)
        first = 3 * number - 3  # each attempt commits three steps and loses two
        tracker = attempt(store, str(tmp_path), number, step=first, last_eval_step=first)
        for step in range(first + 1, first + 6):
            tracker.log(line("train", step, loss=step / 8 + number * (step > first + 3)))
            if step == first + 3:
                tracker.flush()
        kill(tracker)
    assert scalars(tmp_path / "tensorboard") == expected(store)


def test_no_reader_shows_what_only_a_killed_attempt_logged(tmp_path):
    """The resumed attempt evaluates less often, so it never repeats the lost evaluation."""
    store, folder = open_store(str(tmp_path)), tmp_path / "tensorboard"
    folder.mkdir()
    with data_server(folder) as served:
        for number, (step, evaluations) in enumerate(((0, (2, 4, 5)), (3, (6, 8)), (6, ())), 1):
            tracker = attempt(store, str(tmp_path), number, step=step, last_eval_step=step)
            for step_ in range(step + 1, step + 6):
                tracker.log(line("train", step_, loss=step_ / 8 + number * (step_ > step + 3)))
                if step_ in evaluations:
                    tracker.log(line("eval", step_, loss=step_ / 4))
                if step_ == step + 3:
                    tracker.flush()
            kill(tracker)
            assert scalars(folder) == multiplexed(folder) == expected(store)
            served(expected(store))


def test_flush_on_an_object_store_uploads_when_due(tmp_path):
    store = open_store(f"memory:/{tmp_path}")
    tracker = attempt(store, store.url, 1, upload_every_s=0.0)
    tracker.log(line("train", 1, loss=0.5))
    tracker.flush()
    assert displayed(store, store.url, tmp_path / "copy") == {"train/loss": [(1, 0.5)]}
    kill(tracker)
