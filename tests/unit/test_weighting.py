"""A loss that is a mean over items: microbatches count by how many items they have."""

import pytest
import torch
from by_hand import a_job
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from trainer import loop, rng
from trainer.data.source import EvalStream, TrainStream
from trainer.distributed import World
from trainer.preemption import Stop
from trainer.state import State


class Masked:
    """Squared error over the outputs that are wanted; every sample wants another number of them."""

    def loss(self, model, batch):
        inputs, targets, wanted = batch
        outputs = model(inputs)
        error = F.mse_loss(outputs, targets, reduction="none") * wanted
        return error.sum() / wanted.sum().clamp(min=1), outputs

    def weight(self, batch):
        return batch[2].sum()

    def figures(self, outputs, batch):
        return {}

    def metrics(self):
        return {}

    def update(self, metrics, outputs, batch):
        pass


def a_model():
    torch.manual_seed(0)
    return nn.Linear(6, 5).double()


def dataset(size=24, empty=()):
    torch.manual_seed(1)
    wanted = (torch.rand(size, 5) < torch.rand(size, 1)).double()
    wanted[list(empty)] = 0
    return TensorDataset(torch.randn(size, 6).double(), torch.randn(size, 5).double(), wanted)


def masked_job(data, accumulate, world=None):
    world = world or World()
    stream = TrainStream(data, world, 5, 12, accumulate)
    job = a_job(model=a_model(), task=Masked(), data=stream, evaluation=EvalStream(data, world, 5))
    job.world = world
    return job


@pytest.mark.parametrize("accumulate", [2, 3, 4, 12])
def test_microbatches_of_unequal_weight_are_one_large_batch(accumulate):
    data = dataset()
    large, small = masked_job(data, 1), masked_job(data, accumulate)
    pairs = zip(large.data.batches({"epoch": 0, "batch": 0}),
                small.data.batches({"epoch": 0, "batch": 0}), strict=False)  # fmt: skip
    for _, ((one, _), (several, _)) in zip(range(5), pairs, strict=False):
        wanted, _ = loop.train_step(large, one)
        found, _ = loop.train_step(small, several)
        assert found["loss"].item() == pytest.approx(wanted["loss"].item(), rel=1e-6)
        for ours, theirs in zip(small.model.parameters(), large.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_a_microbatch_without_items_counts_for_nothing():
    data = dataset(12, empty=range(12))
    job = masked_job(data, 3)
    before = [p.detach().clone() for p in job.model.parameters()]
    figures, _ = loop.train_step(job, next(job.data.batches({"epoch": 0, "batch": 0}))[0])
    assert figures["loss"].item() == 0
    assert all(torch.equal(a, b) for a, b in zip(job.model.parameters(), before, strict=True))


def test_an_evaluation_is_the_mean_over_all_items():
    data = dataset()
    job = masked_job(data, 1)
    inputs, targets, wanted = data.tensors
    with torch.no_grad():
        error = (job.model(inputs) - targets).square() * wanted
    found = loop.evaluate(job, State(), Stop(World()))
    assert found["loss"] == pytest.approx((error.sum() / wanted.sum()).item(), rel=1e-6)
    rng.seed_all(0)
