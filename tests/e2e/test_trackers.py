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
    # The file name has the run id. The first file lost its last seconds.
    assert killed.name == ended.name
    name, config, history, code, artifacts = wandb_run(ended)
    assert (f"run-{name}.wandb", config["attempt"], code) == (ended.name, 2, 0)
    assert [line["step"] for line in history if "train/loss" in line][-1] == 40
    assert [name for name, _, _ in artifacts] == ["checkpoint-a"]
    saves = [json.loads(text) for text in (run / "saves.jsonl").read_text().splitlines()]
    assert [save["step"] for save in saves if save["attempt"] == 2][-1] == 40
    assert all(save["bytes"] > 0 and save["stall_s"] >= 0 for save in saves)


@pytest.mark.slow
def test_repeated_steps_are_not_dropped_by_a_wandb_server(command, wait_for):
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

        process = command.start(*arguments, STEP_S="0.1", **online)
        wait_for(lambda: committed(run) and seen()[-1:] > [committed(run)[-1]], process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        before = seen()
        done = command(*arguments, **online)
        assert done.returncode == 0, done.stderr
    (server_run,) = server.runs.values()
    resumed = int(re.search(r"resuming from step (\d+)", done.stdout)[1])
    steps = steps_of(server_run["history"])
    assert steps[: len(before)] == before
    assert before[-1] > resumed  # hence some steps are repeated
    assert steps[-(40 - resumed) :] == list(range(resumed + 1, 41))
    wandb_steps = [line["_step"] for line in server_run["history"]]
    assert wandb_steps == list(range(len(wandb_steps)))
    lines = jsonl.read(open_store(str(run)))
    losses = {line["step"]: line["loss"] for line in lines if line["split"] == "train"}
    sent = {
        line["step"]: line["train/loss"] for line in server_run["history"] if "train/loss" in line
    }
    assert sent == losses
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
