"""The checks of one rank, in order."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch

from trainer.cluster import launch, shared_storage
from trainer.cluster import world as distributed
from trainer.cluster.world import World
from trainer.config.schema import Run
from trainer.doctor import data_workers, links, machine, model, places, slurm, trackers
from trainer.doctor.finding import Finding
from trainer.errors import ConfigError
from trainer.monitoring.memory import Sizes
from trainer.storage import Store
from trainer.training import resume

_TIMEOUT_S = 60.0
"""Time limit of the collectives, in seconds."""


def check(run: Run, *, is_quick: bool) -> Iterator[Finding]:
    """Run the checks on one rank; only rank 0 reports them. Collective."""
    yield Finding("configuration", "green", f"{run.name}, {run.run_dir}")
    device = torch.device(launch.device_name(run.launch))
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(device)
    elif device.type == "cuda":
        device = torch.device("cpu")  # `check_devices` reports it
    with ExitStack() as ending:
        world = World(device=device)
        if not is_quick:
            world = distributed.connect(device, timeout_s=_TIMEOUT_S)
            ending.callback(world.close)
        yield from _machine(run, world)
        needs = model.sizes(run, world.size)
        yield model.check_sizes(needs)
        if not is_quick:
            yield links.all_reduce(world, needs.gradients_bytes if needs else None)
        yield from _places(run, world, needs, is_quick=is_quick)
        yield from trackers.check_trackers(run, is_quick=is_quick)


def _machine(run: Run, world: World) -> Iterator[Finding]:
    ranks = machine.collect(world)
    yield machine.check_versions(ranks)
    yield from machine.check_devices(ranks, run.launch.device)
    if world.size > 1:
        yield machine.check_clocks(ranks)
    findings = world.gather_results(lambda: machine.check_signals(run.preemption.signals))
    yield next((finding for finding in findings if finding.state != "green"), findings[0])
    yield from data_workers.check(run, world)


def _places(run: Run, world: World, needs: Sizes | None, *, is_quick: bool) -> Iterator[Finding]:
    stores = resume.open_replicas(run).stores
    topics = ("run_dir", "mirror")
    findings: list[Finding] = []
    save_s = None
    if world.rank == 0:
        settings = run.checkpoint
        counts = (
            settings.keep_last + (settings.keep_best if settings.metric else 0) + 1,
            settings.mirror_keep_last + (settings.mirror_keep_best if settings.metric else 0) + 1,
        )
        for topic, store, count in zip(topics, stores, counts, strict=False):
            findings += places.check_permissions(topic, store)
            findings += places.check_space(
                topic, store, needs.checkpoint_bytes if needs else None, count
            )
            if not is_quick and not any(f.state == "red" for f in findings):
                measured, speed = places.measure_speed(topic, store)
                findings += measured
                if speed and needs and needs.checkpoint_bytes and topic == "run_dir":
                    save_s = needs.checkpoint_bytes / speed.write_bytes_per_s
    yield from findings
    if world.size != world.local_size:
        yield _shared(stores, world)
    if world.rank == 0:
        for store in stores:
            places.remove_empty(store)
        yield from slurm.check_slurm(slurm.settings(), save_s)


def _shared(stores: Sequence[Store], world: World) -> Finding:
    try:
        is_one = shared_storage.is_shared(stores, world)
    except ConfigError as error:
        return Finding("shared", "red", "the nodes do not share run_dir", str(error))
    if is_one:
        return Finding("shared", "green", "all ranks share run_dir")
    return Finding("shared", "green", "each node has a separate run_dir; all share one mirror")
