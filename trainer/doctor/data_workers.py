"""Limits of this machine for data workers: open files, and shared memory."""

import math
from collections.abc import Iterator

from trainer.cluster import launch
from trainer.cluster.world import World
from trainer.config.schema import Run
from trainer.core.formatting import pluralize, size
from trainer.data import limits
from trainer.doctor.finding import Finding

_FEW_DESCRIPTORS = 1024
"""Limit of open files that batches of many tensors exceed."""
_BATCHES = 2
"""Batches that each worker makes ahead."""
_VALUE_BYTES = 4
"""Bytes of one float32 value."""


def check(run: Run, world: World) -> Iterator[Finding]:
    """Check the limits if the run has data workers. Sizes are estimated from `sample.shape`."""
    settings = run.trainer
    if not settings.data_workers:
        return
    local = world.local_size if launch.is_rank() else launch.ranks_on_this_node(run.launch)
    samples = settings.global_batch_size // launch.world_size(run.launch)
    workers = local * settings.data_workers
    yield check_descriptors(limits.descriptors())
    yield check_shared_memory(
        limits.shared_memory(), workers, samples * math.prod(run.sample.shape) * _VALUE_BYTES
    )


def check_descriptors(count: int) -> Finding:
    """Check the limit of open files that a process reaches."""
    text = f"{count:,} open files per process"
    if count >= _FEW_DESCRIPTORS:
        return Finding("open files", "green", text)
    advice = "ulimit -n 65536, docker run --ulimit nofile=65536, or trainer.data_workers=0"
    return Finding("open files", "yellow", f"{text}; each tensor of a batch needs one", advice)


def check_shared_memory(memory: tuple[int, int] | None, workers: int, batch_bytes: int) -> Finding:
    """Check the free shared memory against the batches that workers make ahead.

    Args:
        memory: free and total bytes; None without /dev/shm.
        workers: data workers on this machine.
        batch_bytes: size of one rank's batch.
    """
    advice = "docker run --shm-size=8g or --ipc=host, or lower trainer.data_workers (0 needs none)"
    if memory is None:
        text = f"{limits.SHARED_MEMORY} does not exist; workers pass their batches through it"
        return Finding("shared memory", "red", text, "mount it as tmpfs, or trainer.data_workers=0")
    free_bytes, total_bytes = memory
    text = (
        f"{size(free_bytes)} of {size(total_bytes)} free in {limits.SHARED_MEMORY}; "
        f"{pluralize(workers, 'worker')} with {_BATCHES} batches of {size(batch_bytes)} each"
    )
    if free_bytes < workers * batch_bytes:
        return Finding("shared memory", "red", text, advice)
    if free_bytes < _BATCHES * workers * batch_bytes:
        return Finding("shared memory", "yellow", text, advice)
    return Finding("shared memory", "green", text)
