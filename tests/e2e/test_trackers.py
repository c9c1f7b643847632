"""All trackers at once over a run that is killed, and a server that cannot be reached."""

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
def test_a_killed_run_has_every_step_once_and_one_run_at_wandb(command, wait_for):
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
    shown = scalars(run / "tensorboard")
    for split in ("train", "eval"):
        expected = [line["step"] for line in lines if line["split"] == split]
        assert [step for step, _ in shown[f"{split}/loss"]] == expected
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 41))
    killed, ended = sorted(run.glob("wandb/offline-*/*.wandb"))
    assert killed.name == ended.name  # which has the id; the first file lost its last seconds
    name, config, history, code, artifacts = wandb_run(ended)
    assert (f"run-{name}.wandb", config["attempt"], code) == (ended.name, 2, 0)
    assert [line["step"] for line in history if "train/loss" in line][-1] == 40
    assert [name for name, _, _ in artifacts] == ["checkpoint-a"]
    saves = [json.loads(text) for text in (run / "saves.jsonl").read_text().splitlines()]
    assert [save["step"] for save in saves if save["attempt"] == 2][-1] == 40
    assert all(save["bytes"] > 0 and save["stall_s"] >= 0 for save in saves)


@pytest.mark.slow
def test_at_a_server_that_answers_steps_that_come_again_are_not_dropped(command, wait_for):
    arguments = (*HARD, "name=a", "tracker=wandb", "task._target_=mine.task.Fragile")
    run = command.folder / "runs/a"
    with WandbServer() as server:
        online = {
            **WANDB,
            "WANDB_BASE_URL": server.url,
            "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1",
        }

        def seen():
            return [step for one in server.runs.values() for step in steps_of(one["history"])]

        process = command.start(*arguments, STEP_S="0.1", **online)
        wait_for(lambda: committed(run) and seen()[-1:] > [committed(run)[-1]], process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        before = seen()
        done = command(*arguments, **online)
        assert done.returncode == 0, done.stderr
    (there,) = server.runs.values()
    resumed = int(re.search(r"resuming from step (\d+)", done.stdout)[1])
    steps = steps_of(there["history"])
    assert steps[: len(before)] == before
    assert before[-1] > resumed  # hence some come again
    assert steps[-(40 - resumed) :] == list(range(resumed + 1, 41))
    own = [line["_step"] for line in there["history"]]
    assert own == list(range(len(own)))
    lines = jsonl.read(open_store(str(run)))
    losses = {line["step"]: line["loss"] for line in lines if line["split"] == "train"}
    sent = {line["step"]: line["train/loss"] for line in there["history"] if "train/loss" in line}
    assert sent == losses
    assert there["config"]["attempt"]["value"] == 2
    assert there["summary"]["step"] == 40


def steps_of(history):
    return [line["step"] for line in history if "train/loss" in line]


def jsonl_steps(run):
    try:
        text = (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(one)["step"] for one in text.split("\n")[:-1]]


@pytest.mark.slow
def test_a_server_that_hangs_changes_neither_the_end_nor_the_exit_code(command):
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
    """Whether a process is the library's own, started in `folder`."""
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return "wandb-core" in file.read() and os.readlink(f"/proc/{pid}/cwd") == folder
    except OSError:
        return False
