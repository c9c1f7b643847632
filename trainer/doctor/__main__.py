"""python -m trainer.doctor [key=value …] [--quick] [--json]: check a run before it starts."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, redirect_stdout, suppress

import torch

from trainer.cli import command
from trainer.cluster import launch, shared_storage
from trainer.cluster import world as distributed
from trainer.cluster.slurm import set_rank_variables
from trainer.cluster.world import World
from trainer.config import validate
from trainer.config.compose import compose
from trainer.config.schema import Run
from trainer.doctor import links, machine, model, places, slurm, trackers
from trainer.doctor.finding import Finding, summary, text
from trainer.errors import (
    CONFIGURATION,
    DONE,
    FAILURE,
    ConfigError,
    Problem,
    problems_text,
)
from trainer.monitoring.memory import Sizes
from trainer.storage import Store
from trainer.training import build, resume

_USAGE = """usage: python -m trainer.doctor [key=value …] [--quick] [--json] [--config-dir FOLDER]
  key=value  the arguments of trainer.run
  --quick    skip slow checks: start no ranks, measure no speed
  --json     print one JSON object instead of text
Under torchrun or srun, or with launch.nproc=…, it also checks the links between the ranks.
exit codes: 0 no problem found, 1 the run would fail, 2 the configuration is invalid"""
_FLAGS = ("--quick", "--json")
_TIMEOUT_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command(argv, _USAGE, _check, may_be_empty=True)


def _check(argv: list[str]) -> int:
    flags = {flag for flag in _FLAGS if flag in argv}
    arguments = [argument for argument in argv if argument not in flags]
    run, problems = compose(arguments, _USAGE, _FLAGS)
    set_rank_variables(run.launch.nproc)
    problems += build.check(run)
    is_quick = "--quick" in flags
    if not any(p.key.startswith(("launch.", "trainer.", "parallel.")) for p in problems):
        problems += validate.validate_world(run, launch.world_size(run.launch))
    if problems:
        return _reject(problems, is_json="--json" in flags)
    count = 1 if launch.is_rank() else launch.ranks_on_this_node(run.launch)
    if count > 1 and not is_quick:
        return _start_ranks(argv, count)
    findings = list(_rank(run, is_quick=is_quick))
    if os.environ.get("RANK", "0") == "0":
        _print(findings, is_json="--json" in flags)
    return FAILURE if any(finding.state == "red" for finding in findings) else DONE


def _reject(problems: Sequence[Problem], *, is_json: bool) -> int:
    if not is_json:
        raise ConfigError(problems_text(problems))
    if os.environ.get("RANK", "0") == "0":
        _print([Finding(p.key, "red", p.text) for p in problems], is_json=True)
    return CONFIGURATION


def _print(findings: Sequence[Finding], *, is_json: bool) -> None:
    if is_json:
        document = {"findings": [finding.as_json() for finding in findings]}
        print(json.dumps(document, indent=1), flush=True)
    else:
        print(f"{text(findings)}\n{summary(findings)}", flush=True)


def _start_ranks(argv: Sequence[str], count: int) -> int:
    """Start the ranks of this command on this machine; return their highest exit code."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with ExitStack() as running:
        ranks = []
        for rank in range(count):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "trainer.doctor", *argv]
            ranks.append(running.enter_context(subprocess.Popen(command, env=environment)))  # noqa: S603
        codes = [process.wait() for process in ranks]
    return max(code if code >= 0 else FAILURE for code in codes)


# --- one rank ----------------------------------------------------------------------------------


def _rank(run: Run, *, is_quick: bool) -> Iterator[Finding]:
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


if __name__ == "__main__":
    with suppress(BrokenPipeError), redirect_stdout(sys.stdout):
        sys.exit(main())
