"""Measure what the ranks' vote costs the training thread per step.

python scripts/bench_vote.py [--ranks 2] [--steps 500] [--step-ms 10]

Every rank computes for some milliseconds, then passes a boundary; in turn with an all-reduce of the
same group that is waited for at once, which is what a loop without overlap would do.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from trainer.cluster.stop import Stop
from trainer.cluster.world import connect


def rank(arguments: argparse.Namespace) -> None:
    """Measure on one rank; rank 0 prints."""
    torch.set_num_threads(1)
    world = connect(torch.device("cpu"), timeout_s=60)
    stop, square = Stop(world), torch.randn(200, 200)
    seconds: dict[str, list[float]] = {"vote": [], "all-reduce": []}

    def compute() -> None:
        until = time.perf_counter() + arguments.step_ms / 1e3
        while time.perf_counter() < until:
            square @ square

    for name, pass_boundary in {
        "vote": stop.agree,
        "all-reduce": lambda: dist.all_reduce(torch.zeros(4), group=world.control),
    }.items():
        for step in range(arguments.steps + 20):
            compute()
            began = time.perf_counter()
            pass_boundary()
            if step >= 20:
                seconds[name].append(time.perf_counter() - began)
        stop.settle()
    if world.rank == 0:
        for name, samples in seconds.items():
            tenths = statistics.quantiles(samples, n=10)
            print(f"{name:<12} {1e6 * statistics.median(samples):7.1f} µs a step, median "
                  f"({1e6 * tenths[0]:.1f} to {1e6 * tenths[-1]:.1f}, tenths)")  # fmt: skip
    world.close()


def main() -> int:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--step-ms", type=float, default=10.0)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        rank(arguments)
        return 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={
                **os.environ, "RANK": str(number), "LOCAL_RANK": str(number),
                "WORLD_SIZE": str(arguments.ranks), "LOCAL_WORLD_SIZE": str(arguments.ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
        )
        for number in range(arguments.ranks)
    ]  # fmt: skip
    return max(process.wait() for process in ranks)


if __name__ == "__main__":
    sys.exit(main())
