"""A run stored on a real Azure Blob server: killed, resumed, mirrored, copied, exported."""

import json
import signal
import uuid

import pytest
from support.azurite import CONTAINER
from support.run_commands import HARD

from scripts.compare_runs import differences
from trainer.checkpoint import lineage
from trainer.storage import open_store

FRAGILE = [*HARD, "task._target_=mine.task.Fragile"]


@pytest.fixture
def bucket(azure, command):
    """The URL of a folder for runs, with the account in the command's environment."""
    command.env |= azure.environment
    return f"az://{CONTAINER}/{uuid.uuid4().hex}"


def test_killed_run_resumes_to_identical_results_and_is_exported_and_copied(command, bucket):
    uninterrupted = [*FRAGILE, f"run_dir={bucket}/uninterrupted"]
    broken = [*FRAGILE, f"run_dir={bucket}/broken"]
    assert command(*uninterrupted).returncode == 0
    (command.folder / "a file").touch()  # Fragile waits for a file before it kills itself
    killed = command(*broken, DIE_AT="0:13")
    assert killed.returncode in (-signal.SIGKILL, 75), killed.stderr
    stopped = command(*broken, TERM_AT="0:9")
    assert stopped.returncode == 75, stopped.stderr
    done = command(*broken)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stdout
    assert differences(f"{bucket}/uninterrupted", f"{bucket}/broken") == []
    exported = command(f"{bucket}/broken", "format=safetensors", module="trainer.export")
    assert exported.returncode == 0, exported.stderr
    assert open_store(f"{bucket}/broken").size("exports/step-00000040.safetensors") > 1000
    copied = command(
        "copy", f"{bucket}/broken", str(command.folder / "copy"), "--json",
        module="trainer.checkpoints",
    )  # fmt: skip
    assert copied.returncode == 0, copied.stderr
    assert json.loads(copied.stdout)["copied"][-1] == 40
    assert differences(f"{bucket}/broken", str(command.folder / "copy")) == []


def test_newer_job_supersedes_the_older_on_the_same_run(command, bucket, wait_for):
    run = f"{bucket}/a"
    process = command.start(*FRAGILE, f"run_dir={run}", STEP_S="0.2")
    store = open_store(run)
    wait_for(lambda: lineage.commits(store) != [], process)
    newer = command(*FRAGILE, f"run_dir={run}")
    assert newer.returncode == 0, newer.stderr
    _, err = process.communicate(timeout=240)
    assert process.returncode == 76, err
    assert lineage.commits(store)[-1].step == 40


def test_mirror_is_a_complete_run(command, bucket):
    mirror, run = f"{bucket}/mirror", command.folder / "runs/a"
    done = command(*FRAGILE, "name=a", f"checkpoint.mirror={mirror}")
    assert done.returncode == 0, done.stderr
    assert lineage.commits(open_store(mirror))[-1].step == 40
    assert differences(mirror, str(run)) == []
