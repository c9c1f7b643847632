"""A loss that is a mean over items: microbatches count by how many items they have."""

import pytest
import torch
from support.weighted_jobs import dataset, masked_job

from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.core import rng
from trainer.core.state import State
from trainer.training.evaluation import evaluate
from trainer.training.step import train_step


@pytest.mark.parametrize("accumulate", [2, 3, 4, 12])
def test_microbatches_of_unequal_weight_are_one_large_batch(accumulate):
    data = dataset()
    large, small = masked_job(data, 1), masked_job(data, accumulate)
    pairs = zip(large.data.batches({"epoch": 0, "batch": 0}),
                small.data.batches({"epoch": 0, "batch": 0}), strict=False)  # fmt: skip
    for _, ((one, _), (several, _)) in zip(range(5), pairs, strict=False):
        expected, _ = train_step(large, one)
        result, _ = train_step(small, several)
        assert result["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)
        for actual, reference in zip(
            small.model.parameters(), large.model.parameters(), strict=True
        ):
            torch.testing.assert_close(actual, reference, rtol=1e-6, atol=1e-9)


def test_microbatch_without_items_has_no_weight():
    data = dataset(12, empty=range(12))
    job = masked_job(data, 3)
    before = [p.detach().clone() for p in job.model.parameters()]
    metrics, _ = train_step(job, next(job.data.batches({"epoch": 0, "batch": 0}))[0])
    assert metrics["loss"].item() == 0
    assert all(torch.equal(a, b) for a, b in zip(job.model.parameters(), before, strict=True))


def test_evaluation_is_the_mean_over_all_items():
    data = dataset()
    job = masked_job(data, 1)
    inputs, targets, expected = data.tensors
    with torch.no_grad():
        error = (job.model(inputs) - targets).square() * expected
    result = evaluate(job, State(), Stop(World()))
    assert result["loss"] == pytest.approx((error.sum() / expected.sum()).item(), rel=1e-6)
    rng.seed_all(0)
