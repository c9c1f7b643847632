"""Rehearsal before the first step: found mistakes, and no trace."""

import copy
from dataclasses import replace

import pytest
import torch
import torchmetrics
from support.loop_jobs import DATA, Net, a_job, everything, sgd
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import classification

from trainer.cluster.world import World
from trainer.config.schema import Parallel, Run, Trainer
from trainer.core.state import State
from trainer.data.source import EvalStream, TrainStream
from trainer.errors import ConfigError
from trainer.task import Classification
from trainer.training.rehearsal import check_optimizer, rehearse

RUN = Run(name="a", run_dir="a")


class Counting(Net):
    """Network that counts its calls in a plain attribute."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.factor = 1.0

    def forward(self, x):
        self.calls += 1
        self.factor *= 0.5
        return super().forward(x)


class CountingTask(Classification):
    batches = 0

    def loss(self, model, batch):
        self.batches += 1
        torch.rand(3)
        return super().loss(model, batch)


def trace_of(job):
    modules = {name: dict(vars(module)) for name, module in job.model.named_modules()}
    numbers = {k: {n: v for n, v in m.items() if type(v) in (int, float, bool)}
               for k, m in modules.items()}  # fmt: skip
    return everything(job, State()), numbers, dict(vars(job.task)), job.metrics


@pytest.mark.parametrize("model", [Net, Counting])
@pytest.mark.parametrize("workers", [0, 2])
def test_rehearse_leaves_no_trace(model, workers):
    job = a_job(model=model(), task=CountingTask())
    job.data = TrainStream(DATA.train, World(), 5, 8, workers=workers)
    job.evaluation = EvalStream(DATA.eval, World(), 5, workers)
    before = copy.deepcopy(trace_of(job))
    rehearse(RUN, job)
    assert trace_of(job) == before
    assert job.model.training
    assert all(parameter.grad is None for parameter in job.model.parameters())


def test_rehearse_compiles_nothing():
    def backend(graph, inputs):
        raise AssertionError("compiled")

    job = a_job()
    job.model.forward = torch.compile(job.model.forward, backend=backend)
    rehearse(Run(name="a", run_dir="a", parallel=Parallel(compile="model")), job)


class Task(Classification):
    """Task with one metric, made by `make` and updated with scores and labels."""

    def __init__(self, make, key="extra"):
        super().__init__()
        self._make, self._key = make, key

    def metrics(self):
        return {"accuracy": torchmetrics.MeanMetric(), self._key: self._make()}

    def update(self, metrics, outputs, batch):
        super().update(metrics, outputs, batch)
        metrics[self._key].update(outputs.softmax(1), batch[1])


def of_shape(*shape, classes=3):
    data = TensorDataset(torch.rand(16, *shape), torch.arange(16) % classes)
    return {
        "data": TrainStream(data, World(), 5, 8),
        "evaluation": EvalStream(data, World(), 5),
    }


class VectorLoss(Classification):
    def loss(self, model, batch):
        logits = model(batch[0])
        return nn.functional.cross_entropy(logits, batch[1], reduction="none"), logits


class VectorMetric(Classification):
    def train_metrics(self, outputs, batch):
        return {"hits": (outputs.argmax(1) == batch[1]).float()}


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        (of_shape(7), ["training data does not fit", "body.0, Linear(in_features=6", "[8, 7]"]),
        (of_shape(2, 6), ["does not fit", "batch: [0] [8, 2, 6] float32, [1] [8] int64"]),
        (of_shape(6, classes=9), ["labels range from 0 to", "sample.classes="]),
        ({"evaluation": of_shape(5)["evaluation"]}, ["evaluation data does not fit", "[5, 5]"]),
        ({"task": VectorLoss()}, ["loss() returns a Tensor of shape [8]"]),
        ({"task": VectorMetric()}, ["returns 'hits' as a Tensor of shape [8]"]),
        ({"task": Task(lambda: classification.MulticlassAccuracy(3, average=None))},
         ["the metric 'extra' computes a Tensor of shape [3], not a number"]),
        ({"task": Task(lambda: classification.MulticlassAccuracy(4))}, ["does not fit", "classes"]),
        ({"task": Task(lambda: torchmetrics.MetricCollection([classification.MulticlassF1Score(3)])
                       ), "metric": "extra_MulticlassF1Scor"}, ["did you mean"]),
    ],
)  # fmt: skip
def test_rehearse_reports_what_does_not_fit(changes, texts):
    with pytest.raises(ConfigError) as caught:
        rehearse(RUN, a_job(**changes))
    for text in texts:
        assert text in str(caught.value)


class Broken(Net):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("no attribute shape"),
        ValueError("a size that I reject"),
        RuntimeError("my dimension check"),
        torch.OutOfMemoryError("tensor size"),
    ],
)
def test_rehearse_passes_errors_of_user_code(error):
    job = a_job(model=Net())
    job.model.body = Broken(error)
    with pytest.raises(type(error)) as caught:
        rehearse(RUN, job)
    assert caught.value is error


class NeedsMany(torchmetrics.MeanMetric):
    def update(self, scores, labels):
        super().update(labels.float())

    def compute(self):
        if self.weight < 20:
            raise ValueError("at least 20 samples are needed")
        return super().compute()


def test_rehearse_accepts_metrics_that_need_more_samples():
    rehearse(RUN, a_job(task=Task(NeedsMany), metric="extra"))


class Misspelt(NeedsMany):
    def compute(self):
        return self.no_such_state


def test_rehearse_finds_mistakes_in_compute():
    with pytest.raises(AttributeError, match="no_such_state"):
        rehearse(RUN, a_job(task=Task(Misspelt)))


def test_rehearse_without_evaluation_data_tries_training_only():
    job = a_job(evaluation=None, optimizer=sgd)
    rehearse(RUN, job)
    assert job.metrics is None


# --- optimizers and schedules without data ------------------------------------------------------

ONE_CYCLE = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.1, "total_steps": 30}


class Eager(nn.Module):
    """Network that computes with its weights when it is built, which the meta device cannot."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.scale = self.layer.weight.sum().item()


def configured(**changes):
    groups = {
        "model": {"_target_": "models.mlp.MLP", "input_shape": [4], "hidden": [3], "classes": 3},
        "data": {"_target_": "a.dataset.that.no.check.Reads"},
        "task": {"_target_": "trainer.task.Classification"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "trainer": Trainer(max_epochs=None, max_steps=40),
    }
    return replace(RUN, **{**groups, **changes})


@pytest.mark.parametrize(("changes", "text"), [
    ({"optimizer": {"_target_": "torch.optim.Muon"}}, "Rejected parameters: .*bias"),
    ({"optimizer": {"_target_": "torch.optim.SGD", "lr": -1}}, "Invalid learning rate: -1"),
    (
        {"optimizer": {"_target_": "support.wrapper_optimizers.Lookahead"}},
        "keeps state in .*count, slow",
    ),
    ({"scheduler": ONE_CYCLE}, "ends before the run, which takes 40 more steps"),
    ({"trainer": Trainer(max_steps=40, freeze=["nothing.*"])}, "no parameter matches"),
])  # fmt: skip
def test_check_optimizer_rejects_before_any_data_is_read(changes, text):
    with pytest.raises(ConfigError, match=text):
        check_optimizer(configured(**changes))


@pytest.mark.parametrize("changes", [
    {},
    {"scheduler": {**ONE_CYCLE, "total_steps": "total_steps"}},
    {"scheduler": {**ONE_CYCLE, "interval": "epoch"}},
    {"scheduler": ONE_CYCLE, "trainer": Trainer(max_steps=40, max_epochs=1)},
    {"scheduler": ONE_CYCLE, "resume": "runs/another"},
    {"scheduler": {**ONE_CYCLE, "total_steps": "total_epochs"}},
    {"model": {"_target_": f"{__name__}.Eager"}, "optimizer": {"_target_": "torch.optim.Muon"}},
])  # fmt: skip
def test_check_optimizer_accepts_what_may_fit_the_data(changes):
    check_optimizer(configured(**changes))
