"""Averaged weights: values, evaluation, checkpoints; and early stopping."""

import pytest
import torch
from support.loop_jobs import BEGINNING, Lines, Net, a_job, a_saver, everything, go_on, sgd
from torch import nn

from trainer.cluster.stop import Stop
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.task import Classification
from trainer.training import loop
from trainer.training.ema import Ema
from trainer.training.evaluation import evaluate
from trainer.training.step import train_step

DECAY = 0.8


def averaged_job(**changes):
    model = changes.pop("model", None) or a_job().model
    return a_job(model=model, ema=Ema(model, DECAY), **changes)


def test_update_follows_the_definition_of_the_average():
    job = averaged_job()
    expected = {name: p.detach().double() for name, p in job.model.named_parameters()}
    batches = job.data.batches(BEGINNING)
    for _ in range(5):
        train_step(job, next(batches)[0])
        for name, parameter in job.model.named_parameters():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * parameter.detach().double()
    for name, average in job.ema.averages.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_ema_excludes_frozen_parameters():
    model = Net()
    model.body[0].requires_grad_(False)
    names = set(Ema(model, DECAY).averages)
    assert names == {"body.1.weight", "body.1.bias", "body.4.weight", "body.4.bias"}


def test_evaluate_uses_averages_and_leaves_training_state_unchanged():
    job = averaged_job()
    batches = job.data.batches(BEGINNING)
    for _ in range(3):
        train_step(job, next(batches)[0])
    twin = a_job(model=Net())
    twin.model.load_state_dict({**job.model.state_dict(), **job.ema.averages})
    before = everything(job, State())
    metrics = evaluate(job, State(), Stop(job.world))
    assert metrics == evaluate(twin, State(), Stop(twin.world))
    assert metrics != evaluate(a_job(model=job.model), State(), Stop(job.world))
    assert everything(job, State()) == before


def test_evaluate_failure_restores_the_weights():
    class Fails(Classification):
        def loss(self, model, batch):
            raise KeyError("expected")

    job = averaged_job()
    train_step(job, next(job.data.batches(BEGINNING))[0])
    job.task = Fails()
    before = everything(job, State())
    with pytest.raises(KeyError):
        evaluate(job, State(), Stop(job.world))
    assert everything(job, State()) == before


def test_resumed_run_ends_with_identical_averages(tmp_path):
    full = averaged_job()
    state, done = go_on(tmp_path / "full", full)
    assert done
    half = averaged_job(max_steps=7)
    go_on(tmp_path / "half", half)
    rest = averaged_job()
    its_state, done = go_on(tmp_path / "half", rest)
    assert done
    assert everything(rest, its_state) == everything(full, state)
    assert "ema.body.0.weight" in everything(full, state)[0]
    assert not torch.equal(full.ema.averages["body.0.weight"], full.model.body[0].weight)


def test_resume_from_a_run_without_averages_starts_from_its_weights(tmp_path):
    go_on(tmp_path, a_job(max_steps=5))
    job = averaged_job(max_steps=5)
    go_on(tmp_path, job)
    for name, parameter in job.model.named_parameters():
        assert torch.equal(job.ema.averages[name], parameter)


def test_ema_without_trainable_parameters_is_empty():
    ema = Ema(nn.Flatten(), DECAY)
    ema.update()
    assert ema.averages == {}


# --- early stopping -------------------------------------------------------------------------


class Scored(Classification):
    """Reports given scores, one per evaluation."""

    def __init__(self, scores):
        super().__init__()
        self.scores = list(scores)

    def metrics(self):
        from torchmetrics import MeanMetric

        return {"score": MeanMetric()}

    def update(self, metrics, outputs, batch):
        if not metrics["score"].update_called:
            metrics["score"].update(self.scores.pop(0))


def test_train_stops_after_patience_evaluations_without_improvement(tmp_path):
    tracker = Lines()
    job = a_job(
        task=Scored([0.1, 0.3, 0.2, 0.3, 0.9]), metric="score", patience_evals=2,
        eval_every=Every(steps=2), tracker=tracker,
    )  # fmt: skip
    saver = a_saver(tmp_path)
    state = State()
    assert loop.train(job, state, saver, Stop(job.world))
    assert state.step == 8
    assert state.best == {"value": pytest.approx(0.3), "step": 4}
    assert [line["step"] for line in tracker.of("eval")] == [2, 4, 6, 8]
    assert saver.committed_step == 8


def test_patience_continues_after_a_resume(tmp_path):
    settings = {"metric": "score", "patience_evals": 2, "eval_every": Every(steps=2)}
    go_on(tmp_path, a_job(task=Scored([0.3, 0.2]), max_steps=4, optimizer=sgd, **settings))
    state, done = go_on(tmp_path, a_job(task=Scored([0.1, 0.9]), **settings))
    assert done
    assert state.step == 6
