"""Steps of ranks with unequally weighted microbatches equal those of one process."""

import numpy as np
import pytest

from trainer.config.schema import Parallel


def steps(world, strategy, accumulate):
    """Train three steps; return the means of the ranks' losses, and the weights."""
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
        metrics, _ = train_step(job, next(batches)[0])
        losses.append(world.mean(metrics["loss"]).item())
    tensors = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in job.model.parameters()]
    return losses, [p.detach().numpy().copy() for p in tensors]


@pytest.mark.parametrize(("strategy", "size"), [("ddp", 2), ("ddp", 3), ("fsdp", 2)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_weighted_steps_equal_single_process_steps(on_ranks, strategy, size, accumulate):
    from trainer.cluster.world import World

    losses, weights = steps(World(), "", 1)
    for rank_losses, rank_weights in on_ranks(size, steps, strategy, accumulate):
        np.testing.assert_allclose(rank_losses, losses, rtol=1e-6)
        for rank_array, array in zip(rank_weights, weights, strict=True):
            np.testing.assert_allclose(rank_array, array, rtol=1e-6, atol=1e-9)
