"""Ranks whose microbatches have unequal weights take the step of one process."""

import sys
from pathlib import Path

import numpy as np
import pytest
from trainer.config.schema import Parallel



def steps(world, strategy, accumulate):
    """Three steps; return the weights and the mean of the ranks' losses."""
    import torch
    from support.weighted_jobs import dataset, masked_job

    from trainer.training import parallel
    from trainer.training.job import Phase
    from trainer.training.step import train_step

    job = masked_job(dataset(), accumulate, world)
    if strategy:
        options = Parallel() if strategy == "ddp" else Parallel(strategy="fsdp")
        wrapped = parallel.wrap(job.model, world, options)
        optimizer = torch.optim.SGD(job.model.parameters(), lr=0.1, momentum=0.9)
        job.phases = [Phase(wrapped=wrapped, optimizer=optimizer)]
    batches, losses = job.data.batches({"epoch": 0, "batch": 0}), []
    for _ in range(3):
        figures, _ = train_step(job, next(batches)[0])
        losses.append(world.mean(figures["loss"]).item())
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in job.model.parameters()]
    return losses, [p.detach().numpy().copy() for p in whole]


@pytest.mark.parametrize(("strategy", "size"), [("ddp", 2), ("ddp", 3), ("fsdp", 2)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_is_that_of_one_process(on_ranks, strategy, size, accumulate):
    from trainer.cluster.world import World

    losses, weights = steps(World(), "", 1)
    for its_losses, its_weights in on_ranks(size, steps, strategy, accumulate):
        np.testing.assert_allclose(its_losses, losses, rtol=1e-6)
        for ours, theirs in zip(its_weights, weights, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)
