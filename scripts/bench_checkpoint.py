"""Checkpoint speed against the raw disk and other libraries: alternating runs, median ratios.

python scripts/bench_checkpoint.py [--rounds 5] [--folder DIR] [--only save,load,stall,plan,scale]

The state has the shapes of GPT-2 small with AdamW: 124 M parameters, fp32, 1.5 GB. World sizes 1
and 2 (gloo), replicated as under DDP. fio measures the disk's limit in the same rounds
(Debian: fio), 4 MiB, queue depth 8, direct. Memory is touched before anything is timed.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from bench_plan import bench_plan, bench_scale
from bench_state import Job, drop_caches, fio, gpt2_small_shapes, store_alone

from trainer import checkpoint
from trainer.checkpoint import lineage
from trainer.checkpoint.memory import HostBuffer
from trainer.cluster.world import World, connect
from trainer.storage import LocalStore

STEP_S = 0.4
STEPS = 8


def fsync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def timed(do: Callable[[], object], world: World) -> float:
    """Return the seconds until `do` has returned on every rank."""
    barrier(world)
    began = time.perf_counter()
    do()
    barrier(world)
    return time.perf_counter() - began


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier(group=world.control)


# --- benchmarks ---


def bench_save(  # noqa: C901 (one closure for each rival)
    job: Job, world: World, folder: Path, rounds: int
) -> dict[str, list[float]]:
    """Measure durable saves of all libraries alternately, in seconds."""
    run = folder / "perdure"
    store = LocalStore(run)
    writer = checkpoint.Writer(store, world, world.run_on_rank0(lambda: lineage.begin(store, {})))
    first = world.rank == 0
    step = 0

    def save_perdure() -> None:
        nonlocal step
        step += 1
        checkpoint.save(writer, job.content(), step=step)

    def by_dcp() -> None:
        dcp.save(job.state_dict(), checkpoint_id=folder / "dcp", no_dist=world.size == 1)

    def by_torch() -> None:
        if first:
            (folder / "torch").mkdir(exist_ok=True)
            torch.save(job.state_dict(), folder / "torch" / "state.pt")
            fsync_tree(folder / "torch")

    def by_safetensors() -> None:
        from safetensors.torch import save_file

        if first:
            (folder / "safetensors").mkdir(exist_ok=True)
            save_file(job.tensors(), folder / "safetensors" / "state.safetensors")
            fsync_tree(folder / "safetensors")

    ways: dict[str, Callable[[], None]] = {
        "perdure": save_perdure, "dcp.save": by_dcp, "torch.save+fsync": by_torch,
        "safetensors+fsync": by_safetensors,
    }  # fmt: skip
    places = {
        "perdure": run / "checkpoints", "dcp.save": folder / "dcp",
        "torch.save+fsync": folder / "torch", "safetensors+fsync": folder / "safetensors",
    }  # fmt: skip
    seconds: dict[str, list[float]] = {
        "raw": [], "store alone": [], **{name: [] for name in ways},
    }  # fmt: skip
    buffer = HostBuffer(job.nbytes() if first else 0, pinned=False)
    buffer.array[:] = 1
    for number in range(rounds + 1):
        barrier(world)
        if first:
            raw = fio(folder, job.nbytes(), "write", direct=True)
            (folder / "fio").unlink()
            os.sync()
            alone = store_alone(folder, buffer, "write")
            (folder / "alone").unlink()
            os.sync()
        for name, way in ways.items():
            took = timed(way, world)
            if number:  # the first round warms up: buffers, plans, imports
                seconds[name].append(took)
            if first:
                shutil.rmtree(places[name])
                os.sync()
            barrier(world)
        if first and number:
            seconds["raw"].append(raw)
            seconds["store alone"].append(alone)
    return seconds


def bench_load(job: Job, world: World, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Measure loads into live tensors from a cold cache, alternately, in seconds."""
    store = LocalStore(folder / "perdure")
    writer = checkpoint.Writer(store, world, world.run_on_rank0(lambda: lineage.begin(store, {})))
    manifest = checkpoint.save(writer, job.content(), step=1)
    dcp.save(job.state_dict(), checkpoint_id=folder / "dcp", no_dist=world.size == 1)
    targets = job.tensors()
    first = world.rank == 0
    buffer = HostBuffer(job.nbytes() if first else 0, pinned=False)
    if first:
        fio(folder, job.nbytes(), "write", direct=True)
        store_alone(folder, buffer, "write")

    def load_perdure() -> None:
        checkpoint.load(store, manifest, targets, peers=world.size)

    def by_dcp() -> None:
        dcp.load(job.state_dict(), checkpoint_id=folder / "dcp", no_dist=world.size == 1)

    seconds: dict[str, list[float]] = {"raw": [], "store alone": [], "perdure": [], "dcp.load": []}
    for number in range(rounds + 1):
        if first:
            drop_caches(folder)
            direct = fio(folder, job.nbytes(), "read", direct=True)
            drop_caches(folder)
            ahead = fio(folder, job.nbytes(), "read", direct=False)
            alone = store_alone(folder, buffer, "read")
            if number:
                seconds["raw"].append(min(direct, ahead))
                seconds["store alone"].append(alone)
        for name, way in {"perdure": load_perdure, "dcp.load": by_dcp}.items():
            if first:
                drop_caches(folder)
            took = timed(way, world)
            if number:
                seconds[name].append(took)
    return seconds


def bench_stall(job: Job, world: World, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Measure the seconds a save costs training: blocked time and slower steps."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    torch.set_num_threads(1)
    store = LocalStore(folder / "perdure")
    marks: dict[str, float] = {}
    register_optimizer_step_pre_hook(lambda *_: marks.update(before=time.perf_counter()))
    writer = checkpoint.Writer(store, world, world.run_on_rank0(lambda: lineage.begin(store, {})))
    checkpoint.save(writer, job.content(), step=1)  # installs its own hook between these two
    register_optimizer_step_pre_hook(lambda *_: marks.update(after=time.perf_counter()))
    flights: list[Any] = []
    number = 1

    def save_perdure() -> None:
        nonlocal number
        number += 1
        flights.append(writer.start_save(job.content(), step=number))

    def by_dcp() -> None:
        flights.append(
            dcp.async_save(job.state_dict(), checkpoint_id=folder / f"dcp-{number}",
                           process_group=world.background)
        )  # fmt: skip

    def steps(save: Callable[[], None] | None) -> tuple[float, float]:
        """Run training steps with a save after the third; return total and blocked seconds."""
        barrier(world)
        began, blocked = time.perf_counter(), 0.0
        for at in range(STEPS):
            job.compute(STEP_S)
            job.optimizer.step()
            if save is not None and at == 2:
                saved = time.perf_counter()
                save()
                blocked = time.perf_counter() - saved
            if save is not None and at == 3:
                blocked += marks["after"] - marks["before"]
        took = time.perf_counter() - began
        for flight in flights:
            flight.result()
        flights.clear()
        if world.rank == 0:
            shutil.rmtree(folder / "perdure" / "checkpoints", ignore_errors=True)
            for old in folder.glob("dcp-*"):
                shutil.rmtree(old)
            os.sync()
        barrier(world)
        return took, blocked

    seconds: dict[str, list[float]] = {
        "plain": [], "perdure": [], "dcp": [], "perdure blocked": [], "dcp blocked": [],
    }  # fmt: skip
    for turn in range(rounds + 1):
        plain, _ = steps(None)
        with_perdure, perdure_blocked = steps(save_perdure)
        with_dcp, dcp_blocked = steps(by_dcp)
        if turn:
            seconds["plain"].append(plain)
            seconds["perdure"].append(with_perdure - plain)
            seconds["dcp"].append(with_dcp - plain)
            seconds["perdure blocked"].append(perdure_blocked)
            seconds["dcp blocked"].append(dcp_blocked)
    return seconds


BENCHES = {"save": bench_save, "load": bench_load, "stall": bench_stall, "plan": bench_plan}


# --- launcher and output ---


def run_ranks(name: str, ranks: int, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Run a benchmark in new processes; return the measurements of rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-") as folder:
        command = [sys.executable, __file__, "--rank", name, "--folder", folder]
        command += ["--rounds", str(arguments.rounds)]
        processes = []
        for rank in range(ranks):
            env = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(max(os.cpu_count() or 1, ranks) // ranks),
            }  # fmt: skip
            processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit(f"{name} on {ranks} ranks failed")
        result: dict[str, list[float]] = json.loads(outputs[0].splitlines()[-1])
        return result


def ratio(one: list[float], other: list[float]) -> str:
    """Return the median of the pairwise ratios, and their range."""
    pairs = [a / b for a, b in zip(one, other, strict=True)]
    return f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"


def show(name: str, ranks: int, seconds: dict[str, list[float]], nbytes: int) -> None:
    """Print the rows of one benchmark."""
    middle = {key: statistics.median(value) for key, value in seconds.items()}
    print(f"\n{name}, world size {ranks}")
    if name in ("save", "load"):
        for key, value in middle.items():
            print(f"  {key:<22} {value:6.2f} s  {nbytes / value / 1e9:5.2f} GB/s")
        print(f"  fraction of raw        {ratio(seconds['raw'], seconds['perdure'])}   target 0.90")
        print(f"  fraction of store alone {ratio(seconds['store alone'], seconds['perdure'])}")
        for key in seconds:
            if key not in ("raw", "store alone", "perdure"):
                print(f"  times faster than {key:<18} {ratio(seconds[key], seconds['perdure'])}")
    elif name == "stall":
        for key, value in middle.items():
            print(f"  {key:<22} {1e3 * value:8.1f} ms")
        print(
            f"  blocked, of dcp's      {ratio(seconds['perdure blocked'], seconds['dcp blocked'])}"
        )
        print(f"  stall, of dcp's        {middle['perdure'] / middle['dcp']:.2f}   target 0.25")
    else:
        for key, value in middle.items():
            unit = "" if "memory" in key else " s"
            print(f"  {key:<40} {value:8.5f}{unit}")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="/var/tmp", help="folder on the disk to measure")
    parser.add_argument("--only", default="save,load,stall,plan,scale")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--rank", choices=BENCHES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        world = connect(torch.device("cpu"), timeout_s=600)
        seconds = BENCHES[arguments.rank](Job(), world, Path(arguments.folder), arguments.rounds)
        if world.rank == 0:
            print(json.dumps(seconds))
        world.close()
        return
    if shutil.which("fio") is None:
        raise SystemExit("fio is required to measure the disk: apt install fio")
    nbytes = sum(t * 3 for t in (prod(s) * 4 for _, s in gpt2_small_shapes()))
    for name in arguments.only.split(","):
        if name == "scale":
            print("\nscale: 512 ranks x 10,000 sharded tensors with Adam, rank 0's part")
            for label, value in bench_scale(512, 10_000).items():
                print(f"  {label:<40} {value:8.2f}")
            continue
        for ranks in map(int, arguments.ranks.split(",")):
            show(name, ranks, run_ranks(name, ranks, arguments), nbytes)


if __name__ == "__main__":
    main()
