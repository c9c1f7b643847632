"""Sample order: a pure function of (seed, epoch), the same on any number of ranks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.core.rng import derive
from trainer.core.state import Cursor


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """Return the sample order of an epoch: a permutation of 0 … size-1, 1-d int64."""
    generator = torch.Generator().manual_seed(derive("order", seed, epoch))
    return torch.randperm(size, generator=generator)


def global_batches(
    cursor: Cursor, *, seed: int, size: int, global_batch_size: int
) -> Iterator[tuple[Tensor, Cursor]]:
    """Yield (sample indices of a global batch, cursor after it) endlessly, from `cursor`.

    The last, incomplete batch of an epoch is dropped. After the last batch of an epoch, the cursor
    is at the start of the next one.
    """
    per_epoch = size // global_batch_size
    epoch, batch = cursor["epoch"], cursor["batch"]
    while True:
        order = permutation(seed, epoch, size)
        while batch < per_epoch:
            indices = order[batch * global_batch_size : (batch + 1) * global_batch_size]
            batch += 1
            is_last = batch == per_epoch
            yield indices, {"epoch": epoch + is_last, "batch": 0 if is_last else batch}
        epoch, batch = epoch + 1, 0


def microbatches(indices: Tensor, *, rank: int, world_size: int, accumulate: int) -> list[Tensor]:
    """Return the indices of this rank's microbatches: equal, consecutive slices."""
    if world_size * accumulate == 1:
        return [indices]
    size = len(indices) // (world_size * accumulate)
    first = rank * accumulate
    return [indices[n * size : (n + 1) * size] for n in range(first, first + accumulate)]
