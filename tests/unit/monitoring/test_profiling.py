"""Profiler: traces of the requested steps only."""

import gzip
import json
import re

import pytest
from support.loop_jobs import a_job, a_saver, everything

from trainer.cluster.stop import Stop
from trainer.core.state import State
from trainer.monitoring.profiling import Profiler
from trainer.storage import open_store
from trainer.training import loop

pytestmark = pytest.mark.usefixtures("one_thread")


def profiled(folder, *, first, count, max_steps=8, state=None):
    """Train; return the messages, the traces by name, and the training state."""
    messages, store = [], open_store(str(folder))
    job = a_job(max_steps=max_steps, evaluation=None)
    profiler = Profiler(
        "attempt-0001", store.replace, first=first, count=count, on_gpu=False, log=messages.append
    )
    state = state or State()
    loop.train(job, state, a_saver(folder), Stop(job.world), profiler=profiler)
    profiler.close(state.step)
    paths = {path.name: path for path in sorted(folder.glob("profile/*"))}
    traces = {name: json.loads(gzip.decompress(path.read_bytes())) for name, path in paths.items()}
    return messages, traces, everything(job, state)


def updates(trace):
    return sum(event.get("name") == "Optimizer.step#SGD.step" for event in trace["traceEvents"])


def test_profiler_traces_requested_steps(tmp_path):
    messages, traces, _ = profiled(tmp_path, first=3, count=2)
    assert list(traces) == ["attempt-0001-steps-3-4.json.gz"]
    assert updates(traces["attempt-0001-steps-3-4.json.gz"]) == 2
    (text,) = messages
    head, titles, *rows = text.splitlines()
    assert "steps 3 to 4" in head
    assert "profile/attempt-0001-steps-3-4.json.gz" in head
    assert titles.startswith("operator")
    assert len(rows) == 15
    times = [float(re.split(r"  +", row)[1]) for row in rows]
    assert times == sorted(times, reverse=True)


def test_profiler_run_end_writes_partial_trace(tmp_path):
    _, traces, _ = profiled(tmp_path, first=7, count=50)
    assert list(traces) == ["attempt-0001-steps-7-8.json.gz"]
    assert updates(traces["attempt-0001-steps-7-8.json.gz"]) == 2


def test_profiler_counts_steps_from_attempt_start(tmp_path):
    state = State(step=5, samples=40, cursor={"epoch": 1, "batch": 0})
    _, traces, _ = profiled(tmp_path, first=2, count=1, state=state)
    assert list(traces) == ["attempt-0001-steps-7-7.json.gz"]


def test_profiler_early_end_logs_warning(tmp_path):
    messages, traces, _ = profiled(tmp_path, first=50, count=1)
    assert traces == {}
    assert messages == [
        "warning: no profile, the attempt ended before its step 50 (trainer.profile_first_step)"
    ]


def test_profiler_does_not_change_the_result(tmp_path):
    job, state = a_job(max_steps=8, evaluation=None), State()
    loop.train(job, state, a_saver(tmp_path / "plain"), Stop(job.world))
    assert profiled(tmp_path / "traced", first=2, count=3)[2] == everything(job, state)
