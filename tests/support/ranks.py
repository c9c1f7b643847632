"""Functions that run on several gloo ranks, one process per rank."""

import multiprocessing
import os
import queue
import socket
import traceback

import pytest
import torch
import torch.distributed as dist


def free_ports(count):
    """Return ports on which nothing listens."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def joined(rank, size, port):
    """Leave the world this process is in, and join one of the first `size` ranks of it.

    Returns None on the ranks that have no part in it.
    """
    from trainer.cluster.world import World, connect

    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
    if size == 1:
        return World() if rank == 0 else None
    return connect(torch.device("cpu"), timeout_s=60) if rank < size else None


def _rank(function, arguments, rank, size, port, results):
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    from trainer.cluster.world import connect

    torch.set_num_threads(1)
    try:
        world = connect(torch.device("cpu"), timeout_s=60)
        results.put((rank, function(world, *arguments), None))
        if dist.is_initialized():
            world.close()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


@pytest.fixture
def on_ranks():
    """Call `function(world, *arguments)` on each of `size` ranks; return the answers in order.

    Ranks in `dying` give none.
    """

    def call(size, function, *arguments, dying=(), timeout_s=120):
        (port,) = free_ports(1)
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        processes = [
            context.Process(target=_rank, args=(function, arguments, rank, size, port, results))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        answers = {}
        for _ in range(size - len(dying)):
            try:
                rank, answer, error = results.get(timeout=timeout_s)
            except queue.Empty:
                rank, error = "?", f"no rank has answered for {timeout_s} s"
            if error:
                for process in processes:
                    process.kill()
                pytest.fail(f"rank {rank}:\n{error}")
            answers[rank] = answer
        for process in processes:
            process.join(timeout=60)
        alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in alive:
            processes[rank].kill()  # or this process would wait for it at its own end
        assert alive == []
        return [answers.get(rank) for rank in range(size)]

    return call
