"""torchrun with a changing number of nodes: one is killed, another joins."""

import json
import math
import os
import signal
import socket

import pytest
from support.run_commands import HARD

# without what depends on how the batch is divided: BatchNorm and dropout
FRAGILE = [
    *HARD, "task._target_=mine.task.Fragile", "model.batch_norm=false", "model.dropout=0.0",
    "name=a",
]  # fmt: skip


@pytest.fixture
def agent(command):
    """Start the torchrun of a node, each in its own process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start():
        return command.start(
            "--nnodes=1:4", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=last_call_timeout=3",
            "-m", "trainer.run", *FRAGILE, module="torch.distributed.run",
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", OMP_NUM_THREADS="1", STEP_S="0.5",
        )  # fmt: skip

    start.port = port
    return start


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def lines(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.mark.slow
def test_run_continues_after_a_node_is_lost_and_another_joins(command, agent, wait_for):
    run = command.folder / "runs/a"

    def ranks_of(attempt):
        path = run / f"attempts/{attempt:04d}.json"
        return json.loads(path.read_text())["world_size"] if path.exists() else None

    first = agent()
    wait_for(lambda: listens(agent.port), first)  # it hosts the rendezvous
    second = agent()
    wait_for(lambda: len(lines(run)) >= 3, first)
    assert ranks_of(1) == 2
    os.kill(second.pid, signal.SIGKILL)  # its rank dies with it
    wait_for(lambda: ranks_of(2) is not None, first)
    third = agent()
    wait_for(lambda: ranks_of(3) is not None, first)
    assert [first.wait(240), third.wait(60)] == [0, 0]
    assert (ranks_of(2), ranks_of(3)) == (1, 2)
    assert command(*FRAGILE[:-1], "name=full").returncode == 0
    trained, full = (
        [line for line in lines(command.folder / "runs" / name) if line["split"] == "train"]
        for name in ("a", "full")
    )
    assert [line["step"] for line in trained] == list(range(1, 41))
    assert [line["samples"] for line in trained] == [line["samples"] for line in full]
    pairs = zip(trained, full, strict=True)
    assert all(math.isclose(a["loss"], b["loss"], rel_tol=1e-4) for a, b in pairs)
