"""How fast steps are, against arithmetic on a clock that the test moves; and in real trainings."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.loop_jobs import Lines, a_job, a_saver, everything
from torch import nn
from torch.utils.data import TensorDataset

from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.data.source import Feed, TrainStream
from trainer.errors import TrainingError
from trainer.monitoring.stragglers import Slowest
from trainer.monitoring.timing import Pace, _of_buckets, _quantile, peak_bytes
from trainer.task import Classification, LanguageModel
from trainer.training import loop


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


pytestmark = pytest.mark.usefixtures("one_thread")


def a_pace(**known):
    """A pace of one rank, its clock, and what stands for the saver and the stop."""
    clock = Clock()
    saver = SimpleNamespace(stall_s=0.0, update_stall_s=0.0)
    stop = SimpleNamespace(waited_s=0.0)
    pace = Pace(World(), clock=clock, **known)
    pace.start(1000, saver, stop, items="tokens")
    return pace, clock, saver, stop


def take(pace, clock, data_s, rest_s):
    pace.begin()
    clock.pass_by(data_s)
    pace.fed()
    clock.pass_by(rest_s)


SECONDS = st.floats(0.001, 100)


# --- arithmetic --------------------------------------------------------------------------------


def test_a_line_has_the_steps_since_the_last_one():
    pace, clock, _, _ = a_pace()
    for rest_s in (1.0, 2.0, 9.0, 3.0):
        take(pace, clock, 0.5, rest_s)
    assert pace.lap(1080, pace.own()) == {
        "samples_per_s": round(80 / 17, 1),
        "step_p50_s": 2.5,
        "step_p95_s": 9.5,
        "step_max_s": 9.5,
        "data_wait_s": 2.0,
        "save_stall_s": 0.0,
    }
    take(pace, clock, 0.25, 0.75)
    found = pace.lap(1090, pace.own())
    assert (found["step_max_s"], found["data_wait_s"], found["samples_per_s"]) == (1.0, 0.25, 10.0)


def test_evaluations_and_saves_are_no_part_of_a_step_and_their_data_of_no_wait():
    pace, clock, saver, stop = a_pace()
    take(pace, clock, 0.0, 1.0)
    with pace.evaluating():
        clock.pass_by(50.0)
        stop.waited_s += 20.0
    clock.pass_by(7.0)  # the saver begins
    saver.stall_s += 7.0
    stop.waited_s += 0.5
    clock.pass_by(0.5)  # some rank has no data
    take(pace, clock, 0.0, 2.0)
    saver.update_stall_s += 0.25  # within the step
    found = pace.lap(1020, pace.own())
    assert (found["step_p50_s"], found["step_max_s"]) == (1.5, 2.0)
    assert (found["data_wait_s"], found["save_stall_s"]) == (0.5, 7.25)
    totals = pace.totals()
    assert (totals.seconds, totals.step_s, totals.eval_s) == (60.5, 3.5, 50.0)
    assert (totals.steps, totals.samples, totals.save_stall_s) == (2, 20, 7.25)


@given(st.lists(st.tuples(SECONDS, SECONDS, st.booleans(), st.booleans(), st.booleans()),
                min_size=1, max_size=30))  # fmt: skip
def test_steps_evaluations_and_saves_are_all_of_the_time(steps):
    pace, clock, saver, _ = a_pace()
    for index, (data_s, rest_s, logs, evaluates, saves) in enumerate(steps):
        take(pace, clock, data_s, rest_s)
        if logs:
            pace.lap(1000 + index, pace.own())
            clock.pass_by(0.125)  # the line is written: the next step's
        if evaluates:
            with pace.evaluating():
                clock.pass_by(3.0)
        if saves:
            saver.stall_s += 2.0
            clock.pass_by(2.0)
    pace.close(1000 + len(steps))
    totals = pace.totals()
    written_s = 0.125 if steps[-1][2] else 0.0  # after the last step there is none to count it to
    assert totals.steps == len(steps)
    assert totals.data_wait_s == pytest.approx(sum(step[0] for step in steps))
    stalls = totals.eval_s + totals.save_stall_s
    assert totals.step_s + stalls + written_s == pytest.approx(totals.seconds)


@given(st.lists(SECONDS, min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_a_quantile_is_the_least_value_that_so_many_do_not_exceed(values, share):
    found = _quantile(sorted(values), share)
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) < share * len(values)


@given(st.lists(SECONDS, min_size=1, max_size=200), st.sampled_from([0.5, 0.95]))
def test_over_an_attempt_quantiles_are_kept_within_two_percent(values, share):
    pace, clock, _, _ = a_pace()
    for index, value in enumerate(values):
        take(pace, clock, 0.0, value)
        if index % 7 == 0:
            pace.lap(1000, pace.own())
    pace.close(1000)
    exact = _quantile(sorted(values), share)
    assert _of_buckets(pace._durations, share) == pytest.approx(exact, rel=0.02)


def test_the_utilisation_is_of_the_time_in_steps():
    pace, clock, _, _ = a_pace(flops_per_step=600, peak_flops_per_s=1000.0)
    for _ in range(4):
        take(pace, clock, 0.5, 0.5)
    with pace.evaluating():
        clock.pass_by(4.0)
    assert pace.lap(1000, pace.own())["flops_per_s"] == 300  # over all of the line's time
    assert pace.totals().mfu == pytest.approx(0.6)


def test_without_a_known_peak_or_count_there_is_no_utilisation():
    for known in ({}, {"flops_per_step": 600}, {"peak_flops_per_s": 1000.0}):
        pace, clock, _, _ = a_pace(**known)
        take(pace, clock, 0.5, 0.5)
        assert pace.totals().mfu is None


# --- a slow rank -------------------------------------------------------------------------------


def slow(*, ranks=4):
    clock = Clock()
    made = Slowest(clock)
    made.hosts = [f"node{rank}" for rank in range(ranks)]
    return made, clock


USUAL = (0.001, 0.099)


def test_a_slow_rank_is_named_with_what_it_spends_its_time_on():
    judge, _ = slow()
    ranks = [USUAL, USUAL, USUAL, (0.15, 0.05)]
    assert judge.add(ranks, 19) == ""  # not yet
    assert judge.add(ranks, 1) == (
        "rank 3 (node3) is slow: 0.2 s of its own in a step where the median is 0.1 s; its data "
        "takes 0.15 s, its forward 0.05 s"
    )


@pytest.mark.parametrize("ranks", [
    [USUAL, USUAL, USUAL, (0.0, 0.129)],  # not by so much
    [(0.0, 0.001), (0.0, 0.001), (0.0, 0.0029)],  # three times as long, and nothing
    [(0.0, 0.0)] * 3,
    [(0.3, 0.0), (0.3, 0.0), USUAL],  # most are
])  # fmt: skip
def test_ranks_that_are_about_alike_are_not(ranks):
    judge, _ = slow()
    assert judge.add(ranks, 100) == ""


def test_of_two_ranks_the_slower_one_is_compared_with_the_other():
    judge, _ = slow(ranks=2)
    assert judge.add([(0.0, 0.14), (0.0, 0.1)], 20).startswith("rank 0 (node0)")


def test_it_is_said_again_after_ten_minutes_and_of_another_rank_at_once():
    judge, clock = slow()
    third = [USUAL, USUAL, USUAL, (0.15, 0.05)]
    first = [USUAL, (0.15, 0.05), USUAL, USUAL]
    assert judge.add(third, 20)
    clock.pass_by(599.0)
    assert judge.add(third, 20) == ""
    assert judge.add(first, 20).startswith("rank 1")
    clock.pass_by(2.0)
    assert judge.add(third, 20)


def test_what_was_slow_once_is_forgotten():
    judge, _ = slow()
    judge.add([USUAL, USUAL, USUAL, (9.0, 0.05)], 20)
    assert judge.add([USUAL] * 4, 20) == ""


# --- in a training -----------------------------------------------------------------------------


def test_every_line_of_a_training_has_figures_that_agree(tmp_path):
    job = a_job(log_every_steps=5, eval_every=Every(steps=4), max_steps=12)
    saver = a_saver(tmp_path, every=Every(steps=3))
    loop.train(job, State(), saver, Stop(World()))
    lines = job.tracker.of("train")
    assert [line["step"] for line in lines] == [5, 10, 12]
    for line in lines:
        assert 0 < line["step_p50_s"] <= line["step_p95_s"] <= line["step_max_s"]
        assert 0 < line["data_wait_s"] < line["step_max_s"] * 5
        assert line["save_stall_s"] > 0
    totals = job.pace.totals()
    evaluations = job.tracker.of("eval")
    assert (totals.steps, totals.samples) == (12, 96)
    assert totals.eval_s <= sum(line["eval_s"] for line in evaluations) + 1e-6
    assert totals.step_s + totals.eval_s + totals.save_stall_s < totals.seconds + 0.01
    assert totals.save_stall_s == saver.stall_s + saver.update_stall_s


def test_it_counts_from_where_the_attempt_began(tmp_path):
    job = a_job(max_steps=12, log_every_steps=3)
    state = State(step=6, samples=48, cursor={"epoch": 1, "batch": 1})
    loop.train(job, state, a_saver(tmp_path), Stop(World()))
    assert (job.pace.totals().steps, job.pace.totals().samples) == (6, 48)


def test_a_run_that_logs_nothing_still_has_totals(tmp_path):
    job = a_job(max_steps=3, log_every_steps=50)
    job.tracker = Lines()
    loop.train(job, State(), a_saver(tmp_path), Stop(World()))
    totals = job.pace.totals()
    assert totals.steps == 3
    assert 0 < totals.step_p50_s <= totals.step_p95_s
    assert totals.peak_bytes[0] > 10_000_000


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))

    def forward(self, x):
        return self.body(x)


def test_tokens_are_counted_as_the_task_weighs_them(tmp_path):
    torch.manual_seed(0)
    inputs, targets = torch.randint(7, (2, 40, 9))
    targets[torch.rand(40, 9) < 0.4] = -100
    data = TensorDataset(inputs, targets)
    clock = Clock()
    job = a_job(
        model=Tokens(), task=LanguageModel(), max_steps=10, log_every_steps=5,
        data=TrainStream(data, World(), 5, 8, 2), evaluation=None,
        pace=Pace(World(), clock=clock),
    )  # fmt: skip
    job.tracker.log = lambda line: (clock.pass_by(2.0), job.tracker.lines.append(dict(line)))
    begin = job.pace.begin
    job.pace.begin = lambda: (clock.pass_by(0.2), begin())
    loop.train(job, State(), a_saver(tmp_path), Stop(World()))
    counted = int((targets != -100).sum())
    assert counted < targets.numel()
    per_s = [line["tokens_per_s"] for line in job.tracker.of("train")]
    assert per_s[0] * 1.0 + per_s[1] * 3.0 == pytest.approx(counted * 2, abs=0.5)  # two epochs


def test_a_task_that_weighs_and_does_not_say_what_has_items(tmp_path):
    class Weighs(Classification):
        def weight(self, batch):
            return len(batch[1])

    job = a_job(task=Weighs(), max_steps=2)
    loop.train(job, State(), a_saver(tmp_path), Stop(World()))
    assert all(line["items_per_s"] > 0 for line in job.tracker.of("train"))


def test_timing_changes_nothing_that_is_learned(tmp_path):
    results = []
    for name, pace in (("a", None), ("b", Pace(World(), flops_per_step=7, peak_flops_per_s=9.0))):
        job = a_job(pace=pace)
        loop.train(job, State(), a_saver(tmp_path / name), Stop(World()))
        results.append(everything(job, State()))
    assert results[0] == results[1]


def test_a_failure_keeps_what_is_known_so_far(tmp_path):
    class Fails(Classification):
        left = 4

        def loss(self, model, batch):
            self.left -= 1
            loss, outputs = super().loss(model, batch)
            return (loss * math.nan if self.left == 0 else loss), outputs

    job = a_job(task=Fails(), log_every_steps=1)
    with pytest.raises(TrainingError):
        loop.train(job, State(), a_saver(tmp_path), Stop(World()))
    assert job.pace.totals().steps == 3


# --- waiting for data --------------------------------------------------------------------------


def test_waiting_until_there_is_data_is_counted():
    stop = Stop(World())
    answers = iter([False, False, False, True, True, True])
    stop.agree(lambda count: next(answers))
    waited_s = stop.waited_s
    assert waited_s > 0
    stop.agree(lambda count: True)
    assert stop.waited_s == waited_s


def test_a_feed_knows_for_how_long_it_was_asked_in_vain(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("trainer.data.source.time.monotonic", clock)
    feed = Feed(lambda key: key, iter(range(3)), device=torch.device("cpu"), workers=0)
    assert feed.has(1)
    assert feed.starved_s == 0
    queue = SimpleNamespace(qsize=lambda: 0)
    monkeypatch.setattr(feed, "_ahead", SimpleNamespace(queue=queue, is_over=False))
    for _ in range(2):
        assert not feed.has(2)  # nobody waits for those
        assert not feed.has(1)
        clock.pass_by(1.5)
    queue.qsize = lambda: 1
    assert feed.has(1)
    clock.pass_by(9.0)
    assert feed.has(1)
    assert feed.starved_s == 3.0


def test_the_memory_is_at_least_what_was_just_used():
    before = peak_bytes(torch.device("cpu"))
    held = torch.ones(before // 4 + 25_000_000)  # four bytes each
    assert peak_bytes(torch.device("cpu")) >= before + held.nbytes // 4
