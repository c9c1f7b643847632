"""NaN and infinite losses and gradients: stop before they are logged or saved, or skip."""

import math

import pytest
import torch
from support.loop_jobs import BEGINNING, Lines, a_job, a_saver, everything, go_on, saved_steps

from trainer.cluster.stop import Stop
from trainer.core import rng
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.errors import TrainingError
from trainer.task import Classification
from trainer.training import loop, nonfinite
from trainer.training.step import train_step


class Bad(Classification):
    """Its loss in training is multiplied by `factor` at the given calls, counted from 1."""

    def __init__(self, calls, factor=math.nan):
        super().__init__()
        self.calls, self.factor, self.count = calls, factor, 0

    def loss(self, model, batch):
        loss, outputs = super().loss(model, batch)
        if model.training:
            self.count += 1
            if self.count in self.calls:
                loss = loss * self.factor
        return loss, outputs


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("log_every_steps", [1, 100])
def test_nonfinite_loss_stops_the_run_and_saves_nothing_later(tmp_path, factor, log_every_steps):
    tracker = Lines()
    job = a_job(task=Bad([5], factor), tracker=tracker, log_every_steps=log_every_steps)
    saver = a_saver(tmp_path, every=Every(steps=2))
    with pytest.raises(TrainingError) as caught:
        loop.train(job, State(), saver, Stop(job.world))
    text = str(caught.value)
    assert f"the loss of step 5 is {factor}" in text
    assert "learning rate 0.1" in text
    assert "step 4" in text
    assert "trainer.on_nonfinite=skip" in text
    assert saved_steps(tmp_path) == [2, 4]
    assert all(line["step"] < 5 for line in tracker.lines)


def test_nonfinite_last_step_is_not_saved(tmp_path):
    job = a_job(task=Bad([12]))
    with pytest.raises(TrainingError, match="step 12"):
        loop.train(job, State(), a_saver(tmp_path), Stop(job.world))
    assert saved_steps(tmp_path) == []


def test_no_evaluation_is_made_of_it(tmp_path):
    tracker = Lines()
    job = a_job(
        task=Bad([3]), tracker=tracker, eval_every=Every(steps=3), log_every_steps=100
    )  # fmt: skip
    with pytest.raises(TrainingError, match="step 3"):
        loop.train(job, State(), a_saver(tmp_path), Stop(job.world))
    assert tracker.lines == []


def test_unchecked_losses_do_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, "_MAX_LOSSES", 4)
    job = a_job(task=Bad([5]), log_every_steps=100)
    with pytest.raises(TrainingError, match="step 5"):
        loop.train(job, State(), a_saver(tmp_path), Stop(job.world))
    assert job.task.count == 8


def test_skipped_step_is_counted_and_changes_no_weight(tmp_path):
    tracker = Lines()
    job = a_job(task=Bad([5]), tracker=tracker, skip_nonfinite=True, max_steps=5)
    twin = a_job(max_steps=5)
    batches = twin.data.batches(BEGINNING)
    for _ in range(4):
        train_step(twin, next(batches)[0])
    rng.seed_all(7)
    state, done = go_on(tmp_path, job)
    assert done
    assert (state.step, state.skipped) == (5, 1)
    assert [line["skipped"] for line in tracker.of("train")] == [0, 0, 0, 0, 1]
    for actual, reference in zip(job.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(actual, reference)


def test_without_a_bad_step_skipping_changes_no_bit(tmp_path):
    plain = a_job()
    state, _ = go_on(tmp_path / "plain", plain)
    careful = a_job(skip_nonfinite=True)
    its_state, _ = go_on(tmp_path / "careful", careful)
    assert everything(careful, its_state) == everything(plain, state)


def test_run_with_skips_resumes_with_the_same_bits(tmp_path):
    undisturbed = a_job(task=Bad([3, 9]), skip_nonfinite=True)
    state, _ = go_on(tmp_path / "undisturbed", undisturbed)
    go_on(tmp_path / "half", a_job(task=Bad([3]), skip_nonfinite=True, max_steps=7))
    rest = a_job(task=Bad([2]), skip_nonfinite=True)
    its_state, _ = go_on(tmp_path / "half", rest)
    assert its_state.skipped == 2
    assert everything(rest, its_state) == everything(undisturbed, state)


@pytest.mark.parametrize("kind", ["skip", "scaler"])
def test_run_whose_updates_are_all_skipped_ends_with_an_error(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(nonfinite, "_MAX_SKIPPED", 4)
    scaler = torch.amp.GradScaler("cpu", enabled=kind == "scaler")
    changes = {"scaler": scaler, "skip_nonfinite": kind == "skip", "log_every_steps": 3}
    job = a_job(task=Bad(range(5, 100)), **changes)
    saver = a_saver(tmp_path, every=Every(steps=2))
    with pytest.raises(
        TrainingError, match=r"the last 4 updates were skipped up to step 8"
    ) as text:
        loop.train(job, State(), saver, Stop(job.world))
    assert "Last good checkpoint: step 6" in str(text.value)
    assert saved_steps(tmp_path) == [2, 4, 6]


def test_skipped_updates_count_in_a_row_only(tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, "_MAX_SKIPPED", 4)
    state, done = go_on(tmp_path, a_job(task=Bad([2, 3, 4, 6, 7, 8, 10]), skip_nonfinite=True))
    assert done
    assert state.skipped == 7


def test_steps_skipped_by_the_scaler_do_not_stop_the_run(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    job = a_job(task=Bad([5], math.inf), scaler=scaler)
    state, done = go_on(tmp_path, job)
    assert done
    assert state.skipped == 1
