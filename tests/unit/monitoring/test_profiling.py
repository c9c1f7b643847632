"""A trace of the steps that were asked for, and of no others."""

import gzip
import json

import pytest
from support.loop_jobs import a_job, a_saver, everything

from trainer.cluster.stop import Stop
from trainer.core.state import State
from trainer.monitoring.profiling import Profiler
from trainer.storage import open_store
from trainer.training import loop

pytestmark = pytest.mark.usefixtures("one_thread")


def profiled(folder, *, first, count, max_steps=8, state=None):
    """Train; return what was said, the traces by name, and all that moves."""
    said, store = [], open_store(str(folder))
    job = a_job(max_steps=max_steps, evaluation=None)
    profiler = Profiler(
        "attempt-0001", store.replace, first=first, count=count, on_gpu=False, say=said.append
    )
    state = state or State()
    loop.train(job, state, a_saver(folder), Stop(job.world), profiler=profiler)
    found = {path.name: path for path in sorted(folder.glob("profile/*"))}
    traces = {name: json.loads(gzip.decompress(path.read_bytes())) for name, path in found.items()}
    return said, traces, everything(job, state)


def updates(trace):
    return sum(event.get("name") == "Optimizer.step#SGD.step" for event in trace["traceEvents"])


def test_the_steps_that_were_asked_for_are_traced(tmp_path):
    said, traces, _ = profiled(tmp_path, first=3, count=2)
    assert list(traces) == ["attempt-0001-steps-3-4.json.gz"]
    assert updates(traces["attempt-0001-steps-3-4.json.gz"]) == 2
    (text,) = said
    head, titles, *rows = text.splitlines()
    assert "steps 3 to 4" in head
    assert "profile/attempt-0001-steps-3-4.json.gz" in head
    assert titles.startswith("operator")
    assert len(rows) == 15
    times = [float(row[40:].split()[0]) for row in rows]
    assert times == sorted(times, reverse=True)


def test_a_run_that_ends_meanwhile_leaves_what_there_is(tmp_path):
    _, traces, _ = profiled(tmp_path, first=7, count=50)
    assert list(traces) == ["attempt-0001-steps-7-8.json.gz"]
    assert updates(traces["attempt-0001-steps-7-8.json.gz"]) == 2


def test_steps_are_counted_from_the_beginning_of_the_attempt(tmp_path):
    state = State(step=5, samples=40, cursor={"epoch": 1, "batch": 0})
    _, traces, _ = profiled(tmp_path, first=2, count=1, state=state)
    assert list(traces) == ["attempt-0001-steps-7-7.json.gz"]


def test_an_attempt_that_ends_before_says_so(tmp_path):
    said, traces, _ = profiled(tmp_path, first=50, count=1)
    assert traces == {}
    assert said == [
        "NOT PROFILED: the attempt ended before its step 50 (trainer.profile_first_step)"
    ]


def test_a_trace_changes_nothing_that_is_learned(tmp_path):
    job, state = a_job(max_steps=8, evaluation=None), State()
    loop.train(job, state, a_saver(tmp_path / "plain"), Stop(job.world))
    assert profiled(tmp_path / "traced", first=2, count=3)[2] == everything(job, state)
