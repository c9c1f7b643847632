"""Step times, on a clock that the test moves and in real training runs."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.loop_jobs import a_job, a_saver, everything
from torch import nn
from torch.utils.data import TensorDataset

from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.data.feed import Feed
from trainer.data.source import TrainStream
from trainer.errors import TrainingError
from trainer.monitoring.stragglers import StragglerDetector
from trainer.monitoring.timing import Timing, _histogram_quantile, _quantile, peak_bytes
from trainer.task import Classification, LanguageModel
from trainer.training import loop


class Clock:
    """A clock that the test advances."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


pytestmark = pytest.mark.usefixtures("one_thread")


def a_timing(samples=1000, **settings):
    """Return the timing of one rank, its clock, and the seconds measured elsewhere."""
    clock, waits = Clock(), {"data_wait": 0.0, "save_stall": 0.0, "update_stall": 0.0}
    readers = {name: lambda name=name: waits[name] for name in waits}
    timing = Timing(World(), samples, readers, items="tokens", clock=clock, **settings)
    return timing, clock, waits


def step(timing, clock, data_s, rest_s):
    timing.begin_step()
    with timing.times("data"):
        clock.advance(data_s)
    clock.advance(rest_s)


def lap(timing, samples):
    return timing.lap(samples, timing.rank_values(0.0))


SECONDS = st.floats(0.001, 100)


# --- arithmetic --------------------------------------------------------------------------------


def test_lap_returns_the_steps_since_the_last_lap():
    timing, clock, _ = a_timing()
    for rest_s in (1.0, 2.0, 9.0, 3.0):
        step(timing, clock, 0.5, rest_s)
    assert lap(timing, 1080) == {
        "samples_per_s": round(80 / 17, 1),
        "step_p50_s": 2.5,
        "step_p95_s": 9.5,
        "step_max_s": 9.5,
        "data_wait_s": 2.0,
        "save_stall_s": 0.0,
    }
    step(timing, clock, 0.25, 0.75)
    metrics = lap(timing, 1090)
    assert metrics["step_max_s"] == 1.0
    assert metrics["data_wait_s"] == 0.25
    assert metrics["samples_per_s"] == 10.0


def test_steps_exclude_evaluations_and_saves_between_them():
    timing, clock, waits = a_timing()
    step(timing, clock, 0.0, 1.0)
    with timing.times("eval"):
        clock.advance(50.0)
        waits["data_wait"] += 20.0
    clock.advance(7.0)  # the saver starts a save
    waits["save_stall"] += 7.0
    waits["data_wait"] += 0.5
    clock.advance(0.5)  # some rank has no data
    step(timing, clock, 0.0, 2.0)
    waits["update_stall"] += 0.25  # within the step
    metrics = lap(timing, 1020)
    assert (metrics["step_p50_s"], metrics["step_max_s"]) == (1.5, 2.0)
    assert (metrics["data_wait_s"], metrics["save_stall_s"]) == (0.5, 7.25)
    totals = timing.totals()
    assert (totals.seconds, totals.step_s, totals.eval_s) == (60.5, 3.5, 50.0)
    assert (totals.steps, totals.samples, totals.save_stall_s) == (2, 20, 7.25)
    assert totals.data_wait_s == 0.5


@given(st.lists(st.tuples(SECONDS, SECONDS, st.booleans(), st.booleans(), st.booleans()),
                min_size=1, max_size=30))  # fmt: skip
def test_steps_evaluations_and_saves_add_up_to_the_total_time(steps):
    timing, clock, waits = a_timing()
    for index, (data_s, rest_s, logs, evaluates, saves) in enumerate(steps):
        step(timing, clock, data_s, rest_s)
        if logs:
            lap(timing, 1000 + index)
            clock.advance(0.125)  # writing the line belongs to the next step
        if evaluates:
            with timing.times("eval"):
                clock.advance(3.0)
        if saves:
            waits["save_stall"] += 2.0
            clock.advance(2.0)
    timing.close(1000 + len(steps))
    totals = timing.totals()
    unassigned_s = 0.125 if steps[-1][2] else 0.0  # no step follows the last line
    assert totals.steps == len(steps)
    assert totals.data_wait_s == pytest.approx(sum(step[0] for step in steps))
    stalls_s = totals.eval_s + totals.save_stall_s
    assert totals.step_s + stalls_s + unassigned_s == pytest.approx(totals.seconds)


@given(st.lists(SECONDS, min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_quantile_is_the_smallest_value_covering_the_fraction(values, fraction):
    quantile = _quantile(sorted(values), fraction)
    assert sum(value <= quantile for value in values) >= fraction * len(values)
    assert sum(value < quantile for value in values) < fraction * len(values)


@given(st.lists(SECONDS, min_size=1, max_size=200), st.sampled_from([0.5, 0.95]))
def test_attempt_quantiles_are_within_two_percent(values, fraction):
    timing, clock, _ = a_timing()
    for index, value in enumerate(values):
        step(timing, clock, 0.0, value)
        if index % 7 == 0:
            lap(timing, 1000)
    timing.close(1000)
    exact = _quantile(sorted(values), fraction)
    assert _histogram_quantile(timing._histogram, fraction) == pytest.approx(exact, rel=0.02)


def test_mfu_is_relative_to_the_time_in_steps():
    timing, clock, _ = a_timing(flops_per_step=600, peak_flops_per_s=1000.0)
    for _ in range(4):
        step(timing, clock, 0.5, 0.5)
    with timing.times("eval"):
        clock.advance(4.0)
    assert lap(timing, 1000)["flops_per_s"] == 300  # over the lap's total time
    assert timing.totals().mfu == pytest.approx(0.6)


def test_mfu_is_none_without_flops_or_peak():
    for settings in ({}, {"flops_per_step": 600}, {"peak_flops_per_s": 1000.0}):
        timing, clock, _ = a_timing(**settings)
        step(timing, clock, 0.5, 0.5)
        assert timing.totals().mfu is None


# --- stragglers --------------------------------------------------------------------------------


def a_detector(*, ranks=4):
    clock = Clock()
    return StragglerDetector([f"node{rank}" for rank in range(ranks)], clock), clock


TYPICAL = (0.001, 0.099)


def test_detector_names_the_straggler_with_its_data_and_forward_time():
    detector, _ = a_detector()
    ranks = [TYPICAL, TYPICAL, TYPICAL, (0.15, 0.05)]
    assert detector.add(ranks, 19) == ""
    assert detector.add(ranks, 1) == (
        "straggler: rank 3 (node3) takes 0.2 s per step, the median rank 0.1 s "
        "(its data: 0.15 s, its forward: 0.05 s)"
    )


@pytest.mark.parametrize("ranks", [
    [TYPICAL, TYPICAL, TYPICAL, (0.0, 0.129)],  # ratio too small
    [(0.0, 0.001), (0.0, 0.001), (0.0, 0.0029), (0.0, 0.001)],  # excess too small
    [(0.0, 0.0)] * 4,
    [(0.3, 0.0), (0.3, 0.0), (0.3, 0.0), TYPICAL],  # the median is as slow
])  # fmt: skip
def test_detector_is_silent_when_ranks_are_similar(ranks):
    detector, _ = a_detector()
    assert detector.add(ranks, 100) == ""


def test_detector_compares_two_ranks_with_the_faster_one():
    detector, _ = a_detector(ranks=2)
    assert detector.add([(0.0, 0.14), (0.0, 0.1)], 20).startswith("straggler: rank 0 (node0)")


def test_detector_repeats_a_rank_after_ten_minutes_and_another_at_once():
    detector, clock = a_detector()
    third = [TYPICAL, TYPICAL, TYPICAL, (0.15, 0.05)]
    first = [TYPICAL, (0.15, 0.05), TYPICAL, TYPICAL]
    assert detector.add(third, 20)
    clock.advance(599.0)
    assert detector.add(third, 20) == ""
    assert detector.add(first, 20).startswith("straggler: rank 1")
    clock.advance(2.0)
    assert detector.add(third, 20)


def test_detector_starts_over_after_each_window():
    detector, _ = a_detector()
    detector.add([TYPICAL, TYPICAL, TYPICAL, (9.0, 0.05)], 20)
    assert detector.add([TYPICAL] * 4, 20) == ""


# --- training runs -----------------------------------------------------------------------------


def train(job, folder, state=None, **settings):
    """Train; return the timing and the saver."""
    state, saver, stop = state or State(), a_saver(folder, **settings), Stop(World())
    timing = loop.start_timing(job, state, saver, stop)
    loop.train(job, state, saver, stop, timing=timing)
    return timing, saver


def test_log_lines_have_consistent_times(tmp_path):
    job = a_job(log_every_steps=5, eval_every=Every(steps=4), max_steps=12)
    timing, saver = train(job, tmp_path, every=Every(steps=3))
    lines = job.tracker.of("train")
    assert [line["step"] for line in lines] == [5, 10, 12]
    for line in lines:
        assert 0 < line["step_p50_s"] <= line["step_p95_s"] <= line["step_max_s"]
        assert 0 < line["data_wait_s"] < line["step_max_s"] * 5
        assert line["save_stall_s"] > 0
    totals = timing.totals()
    evaluations = job.tracker.of("eval")
    assert (totals.steps, totals.samples) == (12, 96)
    assert totals.eval_s <= sum(line["eval_s"] for line in evaluations) + 1e-6
    assert totals.step_s + totals.eval_s + totals.save_stall_s < totals.seconds + 0.01
    assert totals.save_stall_s == saver.stall_s + saver.update_stall_s


def test_totals_count_from_the_start_of_the_attempt(tmp_path):
    job = a_job(max_steps=12, log_every_steps=3)
    state = State(step=6, samples=48, cursor={"epoch": 1, "batch": 1})
    timing, _ = train(job, tmp_path, state)
    assert (timing.totals().steps, timing.totals().samples) == (6, 48)


def test_totals_are_complete_with_a_single_log_line(tmp_path):
    job = a_job(max_steps=3, log_every_steps=50)
    timing, _ = train(job, tmp_path)
    totals = timing.totals()
    assert totals.steps == 3
    assert 0 < totals.step_p50_s <= totals.step_p95_s
    assert totals.peak_bytes[0] > 10_000_000


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))

    def forward(self, x):
        return self.body(x)


def test_tokens_per_s_counts_the_items_of_the_task(tmp_path, monkeypatch):
    torch.manual_seed(0)
    inputs, targets = torch.randint(7, (2, 40, 9))
    targets[torch.rand(40, 9) < 0.4] = -100
    data = TensorDataset(inputs, targets)
    clock = Clock()
    job = a_job(
        model=Tokens(), task=LanguageModel(), max_steps=10, log_every_steps=5,
        data=TrainStream(data, World(), 5, 8, 2), evaluation=None,
    )  # fmt: skip
    job.tracker.log = lambda line: (clock.advance(2.0), job.tracker.lines.append(dict(line)))
    state, saver, stop = State(), a_saver(tmp_path), Stop(World())
    timing = loop.start_timing(job, state, saver, stop)
    timing._clock, timing._lap_began = clock, clock()
    begin_step = timing.begin_step
    monkeypatch.setattr(timing, "begin_step", lambda: (clock.advance(0.2), begin_step()))
    loop.train(job, state, saver, stop, timing=timing)
    tokens = int((targets != -100).sum())
    assert tokens < targets.numel()
    per_s = [line["tokens_per_s"] for line in job.tracker.of("train")]
    assert per_s[0] * 1.0 + per_s[1] * 3.0 == pytest.approx(tokens * 2, abs=0.5)  # two epochs


def test_items_per_s_is_logged_for_a_task_with_unnamed_items(tmp_path):
    class Weighted(Classification):
        def weight(self, batch):
            return len(batch[1])

    job = a_job(task=Weighted(), max_steps=2)
    train(job, tmp_path)
    assert all(line["items_per_s"] > 0 for line in job.tracker.of("train"))


def test_timing_does_not_change_the_result(tmp_path):
    results = []
    for name, settings in (("a", {}), ("b", {"flops_per_step": 7, "peak_flops_per_s": 9.0})):
        job = a_job(**settings)
        train(job, tmp_path / name)
        results.append(everything(job, State()))
    assert results[0] == results[1]


def test_totals_survive_a_failed_step(tmp_path):
    class Fails(Classification):
        calls = 0

        def loss(self, model, batch):
            self.calls += 1
            loss, outputs = super().loss(model, batch)
            return (loss * math.nan if self.calls == 4 else loss), outputs

    job = a_job(task=Fails(), log_every_steps=1)
    state, saver, stop = State(), a_saver(tmp_path), Stop(World())
    timing = loop.start_timing(job, state, saver, stop)
    with pytest.raises(TrainingError):
        loop.train(job, state, saver, stop, timing=timing)
    assert timing.totals().steps == 3


# --- waiting for data --------------------------------------------------------------------------


def test_stop_counts_the_time_without_data():
    stop = Stop(World())
    answers = iter([False, False, False, True, True, True])
    stop.agree(lambda count: next(answers))
    waited_s = stop.waited_s
    assert waited_s > 0
    stop.agree(lambda count: True)
    assert stop.waited_s == waited_s


def test_feed_counts_the_time_between_a_request_and_its_data(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("trainer.data.feed.time.monotonic", clock)
    feed = Feed(lambda key: key, iter(range(3)), device=torch.device("cpu"), workers=0)
    assert feed.has(1)
    assert feed.starved_s == 0
    queue = SimpleNamespace(qsize=lambda: 0)
    monkeypatch.setattr(feed, "_prefetcher", SimpleNamespace(queue=queue, is_exhausted=False))
    for _ in range(2):
        assert not feed.has(2)  # not needed yet
        assert not feed.has(1)
        clock.advance(1.5)
    queue.qsize = lambda: 1
    assert feed.has(1)
    clock.advance(9.0)
    assert feed.has(1)
    assert feed.starved_s == 3.0


def test_peak_bytes_includes_memory_in_use():
    before = peak_bytes(torch.device("cpu"))
    tensor = torch.ones(before // 4 + 25_000_000)  # four bytes per element
    assert peak_bytes(torch.device("cpu")) >= before + tensor.nbytes // 4
