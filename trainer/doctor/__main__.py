"""python -m trainer.doctor [key=value …] [--quick] [--json]: what would go wrong with a run."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, redirect_stdout, suppress
from dataclasses import asdict

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
  key=value  the configuration as trainer.run has it: give the run's own arguments
  --quick    only what takes no second: no ranks are started, no speed is measured
  --json     one JSON object on standard output instead of text
Started by torchrun or srun, or with launch.nproc=…, it examines what lies between the ranks too.
exit codes: 0 nothing is in the way, 1 this would not work, 2 the configuration has to change"""
_FLAGS = ("--quick", "--json")
_TIMEOUT_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command(argv, _USAGE, _examine, may_be_empty=True)


def _examine(argv: list[str]) -> int:
    set_rank_variables()
    flags = {flag for flag in _FLAGS if flag in argv}
    arguments = [argument for argument in argv if argument not in flags]
    run, problems = compose(arguments, _USAGE, _FLAGS)
    problems += build.check(run)
    is_quick = "--quick" in flags
    if not any(p.key.startswith(("launch.", "trainer.", "parallel.")) for p in problems):
        problems += validate.validate_world(run, launch.world_size(run.launch))
    if problems:
        return _refuse(problems, is_json="--json" in flags)
    count = 1 if launch.is_rank() else launch.ranks_on_this_node(run.launch)
    if count > 1 and not is_quick:
        return _start_ranks(argv, count)
    findings = list(_rank(run, is_quick=is_quick))
    if os.environ.get("RANK", "0") == "0":
        _say(findings, is_json="--json" in flags)
    return FAILURE if any(finding.state == "red" for finding in findings) else DONE


def _refuse(problems: Sequence[Problem], *, is_json: bool) -> int:
    if not is_json:
        raise ConfigError(problems_text(problems))
    if os.environ.get("RANK", "0") == "0":
        _say([Finding(p.key, "red", p.text) for p in problems], is_json=True)
    return CONFIGURATION


def _say(findings: Sequence[Finding], *, is_json: bool) -> None:
    if is_json:
        found = {"findings": [asdict(finding) for finding in findings]}
        print(json.dumps(found, indent=1), flush=True)
    else:
        print(f"{text(findings)}\n{summary(findings)}", flush=True)


def _start_ranks(argv: Sequence[str], count: int) -> int:
    """Start ranks of this command on this machine; return the worst of their exit codes."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with ExitStack() as running:
        ranks = []
        for rank in range(count):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "trainer.doctor", *argv]
            ranks.append(running.enter_context(subprocess.Popen(command, env=environment)))  # noqa: S603
        codes = [process.wait() for process in ranks]
    return max(code if code >= 0 else FAILURE for code in codes)


# --- one rank ----------------------------------------------------------------------------------


def _rank(run: Run, *, is_quick: bool) -> Iterator[Finding]:
    """Examine as one of the ranks; the findings are rank 0's to tell. Collective."""
    yield Finding("configuration", "green", f"{run.name}, {run.run_dir}")
    device = torch.device(launch.device_name(run.launch))
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(device)
    elif device.type == "cuda":
        device = torch.device("cpu")  # `devices` tells what is missing
    with ExitStack() as ending:
        world = World(device=device)
        if not is_quick:
            world = distributed.connect(device, timeout_s=_TIMEOUT_S)
            ending.callback(world.close)
        yield from _machine(run, world)
        needs = model.sizes(run, world.size)
        yield model.judge(needs)
        if not is_quick:
            yield links.all_reduce(world, needs.gradients_bytes if needs else None)
        yield from _places(run, world, needs, is_quick=is_quick)
        yield from trackers.examine(run, is_quick=is_quick)


def _machine(run: Run, world: World) -> Iterator[Finding]:
    seen = machine.look(world)
    yield machine.versions(seen)
    yield from machine.devices(seen, run.launch.device)
    if world.size > 1:
        yield machine.clocks(seen)
    found = world.gather_results(lambda: machine.signals(run.preemption.signals))
    yield next((finding for finding in found if finding.state != "green"), found[0])


def _places(run: Run, world: World, needs: Sizes | None, *, is_quick: bool) -> Iterator[Finding]:
    stores = resume.open_replicas(run).stores
    topics = ("run_dir", "mirror")
    findings: list[Finding] = []
    save_s = None
    if world.rank == 0:
        wanted = run.checkpoint
        kept = (
            wanted.keep_last + (wanted.keep_best if wanted.metric else 0) + 1,
            wanted.mirror_keep_last + (wanted.mirror_keep_best if wanted.metric else 0) + 1,
        )
        for topic, store, count in zip(topics, stores, kept, strict=False):
            findings += places.rights(topic, store)
            findings += places.space(topic, store, needs.checkpoint_bytes if needs else None, count)
            if not is_quick and not any(f.state == "red" for f in findings):
                measured, speed = places.speed(topic, store)
                findings += measured
                if speed and needs and needs.checkpoint_bytes and topic == "run_dir":
                    save_s = needs.checkpoint_bytes / speed.write_bytes_per_s
    yield from findings
    if world.size != world.local_size:
        yield _shared(stores, world)
    if world.rank == 0:
        for store in stores:
            places.leave(store)
        yield from slurm.judge(slurm.settings(), save_s)


def _shared(stores: Sequence[Store], world: World) -> Finding:
    try:
        is_one = shared_storage.find_shared(stores, world)
    except ConfigError as error:
        return Finding("shared", "red", "nodes do not see one run_dir", str(error))
    if is_one:
        return Finding("shared", "green", "every rank sees the same run_dir")
    return Finding("shared", "green", "each node has a run_dir of its own, with one mirror")


if __name__ == "__main__":
    with suppress(BrokenPipeError), redirect_stdout(sys.stdout):
        sys.exit(main())
