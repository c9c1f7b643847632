"""Functions that run on several gloo ranks, each in a process of its own."""

import multiprocessing
import os
import socket
import traceback

import pytest
import torch


def _rank(function, arguments, rank, size, port, results):
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    from trainer.distributed import connect

    torch.set_num_threads(1)
    try:
        world = connect(torch.device("cpu"), timeout_s=60)
        results.put((rank, function(world, *arguments), None))
        world.close()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


@pytest.fixture
def on_ranks():
    """Call `function(world, *arguments)` on each of `size` ranks; return the answers in order.

    Ranks in `dying` give none.
    """

    def call(size, function, *arguments, dying=()):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
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
            rank, answer, error = results.get(timeout=120)
            if error:
                for process in processes:
                    process.kill()
                pytest.fail(f"rank {rank}:\n{error}")
            answers[rank] = answer
        for process in processes:
            process.join(timeout=60)
        return [answers.get(rank) for rank in range(size)]

    return call
