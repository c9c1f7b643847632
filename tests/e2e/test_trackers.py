"""All trackers at once in a killed run; W&B servers that respond or hang."""

import json
import os
import re
import signal
import socket

import pytest
from support.event_files import scalars, wandb_run
from support.run_commands import HARD, committed
from support.wandb_server import WandbServer

from trainer.storage import open_store
from trainer.tracking import jsonl

WANDB = {"WANDB_ERROR_REPORTING": "false", "WANDB_API_KEY": "a" * 40}


@pytest.mark.slow
def test_killed_run_logs_every_step_once_and_as_one_wandb_run(command, wait_for):
    arguments = (
        *HARD, "name=a", "tracker=[wandb,tensorboard]", "tracker.wandb.mode=offline",
        "+tracker.mine={_target_: trainer.tracking.console.Console, every_s: 0}",
        "task._target_=mine.task.Fragile", "tracker.wandb.artifacts=manifests",
    )  # fmt: skip
    run = command.folder / "runs/a"
    process = command.start(*arguments, STEP_S="0.1", **WANDB)
    wait_for(lambda: committed(run) and jsonl_steps(run)[-1:] > [committed(run)[-1]], process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    again = command(*arguments, **WANDB)
    assert again.returncode == 0, again.stderr
    lines = jsonl.read(open_store(str(run)))
    curves = scalars(run / "tensorboard")
    for split in ("train", "eval"):
        expected = [line["step"] for line in lines if line["split"] == split]
        assert [step for step, _ in curves[f"{split}/loss"]] == expected
    assert [step for step, _ in curves["train/loss"]] == list(range(1, 41))
    killed, ended = sorted(run.glob("wandb/offline-*/*.wandb"))
    assert killed.name == ended.name  # it has the run id
    name, config, history, code, artifacts = wandb_run(ended)
    assert (f"run-{name}.wandb", config["attempt"], code) == (ended.name, 2, 0)
    # The file of a killed attempt is incomplete, so the next one has all lines of the run.
    in_file = [(row["step"], "train/loss" in row) for row in history]
    assert in_file == [(line["step"], line["split"] == "train") for line in lines]
    assert f"wandb sync runs/a/wandb/{ended.parent.name}" in again.stdout
    assert [name for name, _, _ in artifacts] == ["checkpoint-a"]
    saves = [json.loads(text) for text in (run / "saves.jsonl").read_text().splitlines()]
    assert [save["step"] for save in saves if save["attempt"] == 2][-1] == 40
    assert all(save["bytes"] > 0 and save["stall_s"] >= 0 for save in saves)


@pytest.mark.slow
def test_wandb_server_gets_each_line_of_a_killed_run_once(command, wait_for):
    arguments = (*HARD, "name=a", "tracker=wandb", "task._target_=mine.task.Fragile")
    run = command.folder / "runs/a"
    with WandbServer() as server:
        online = {
            **WANDB,
            "WANDB_BASE_URL": server.url,
            "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1",
        }

        def seen():
            return [step for run in server.runs.values() for step in steps_of(run["history"])]

        def is_ahead():
            return committed(run) and seen()[-1:] > [committed(run)[-1]]

        process = command.start(*arguments, STEP_S="0.1", **online)
        while True:
            wait_for(is_ahead, process)
            process.send_signal(signal.SIGSTOP)  # a commit may come between check and kill
            if is_ahead():
                break
            process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        before = seen()
        done = command(*arguments, **online)
        assert done.returncode == 0, done.stderr
    (server_run,) = server.runs.values()
    resumed = int(re.search(r"resuming from step (\d+)", done.stdout)[1])
    assert before[-1] > resumed  # hence some steps are computed again
    assert steps_of(server_run["history"]) == list(range(1, 41))
    lines = jsonl.read(open_store(str(run)))
    losses = {line["step"]: line["loss"] for line in lines if line["split"] == "train"}
    sent = {
        line["step"]: line["train/loss"] for line in server_run["history"] if "train/loss" in line
    }
    assert sent == losses
    assert len(server_run["history"]) == len(lines)
    assert server_run["config"]["attempt"]["value"] == 2
    assert server_run["summary"]["step"] == 40


def steps_of(history):
    return [line["step"] for line in history if "train/loss" in line]


def jsonl_steps(run):
    try:
        text = (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in text.split("\n")[:-1]]


@pytest.mark.slow
def test_hanging_wandb_server_changes_neither_result_nor_exit_code(command):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        done = command(
            *HARD, "name=a", "tracker=wandb", "tracker.wandb.close_timeout_s=1",
            "tracker.wandb.init_timeout_s=600", WANDB_BASE_URL=url, **WANDB,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Finished at step 40" in done.stdout
    assert "wandb: did not end in 1 s" in done.stderr
    assert not [name for name in os.listdir("/proc") if is_core_of(name, str(command.folder))]


def is_core_of(pid, folder):
    """Return whether a process is wandb-core, started in `folder`."""
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return "wandb-core" in file.read() and os.readlink(f"/proc/{pid}/cwd") == folder
    except OSError:
        return False
