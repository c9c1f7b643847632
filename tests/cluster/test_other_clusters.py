"""Clusters with other settings, job chains without requeueing, and sweeps submitted by Hydra."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.slurm_jobs import (
    FRAGILE,
    SLURM,
    TWO_BY_TWO,
    of_jobs,
    record,
    same,
    steps,
    submitter,
    undisturbed,
)

__all__ = ["undisturbed"]

NO_USER_SIGNAL = {"EXTRA": "SlurmctldParameters=idle_on_node_suspend", "GRACE": "20"}
SETTINGS = {
    "no user signal": NO_USER_SIGNAL,
    "no grace time": {**NO_USER_SIGNAL, "GRACE": "0", "KILLWAIT": "30"},
}
if Path("/sys/fs/cgroup/freezer").is_dir():  # SLURM's cgroup/v1; version 2 wants systemd
    SETTINGS["processes tracked by cgroup"] = {"PROCTRACK": "cgroup", "GRACE": "20"}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_preempted_job_resumes_under_other_cluster_settings(
    command, another_cluster, settings, undisturbed
):
    cluster = another_cluster(**settings)
    job = submitter(cluster, command)(*FRAGILE, "name=a", options=TWO_BY_TWO, STEP_S="0.2")
    cluster.wait(job, lambda: steps(command, "a") >= 3)
    cluster.preempt()
    assert cluster.ended(job) == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "1"
    first = record(command, "a", 1)
    assert first["outcome"] == "preempted"
    assert first["reason"] in ("SIGTERM", "SIGUSR2")
    if "EXTRA" in settings:
        assert first["reason"] == "SIGTERM"
    assert record(command, "a", 2)["first_step"] == first["last_step"]
    assert same(undisturbed, command, "a")


def test_chain_resumes_in_the_next_job_and_ends_with_the_run(cluster, command):
    environment = {**cluster._env, **of_jobs(command), "STEP_S": "0.2"}
    environment |= {"PERDURE_PYTHON": sys.executable, "PERDURE_SLURM": str(SLURM)}
    done = subprocess.run(
        [SLURM / "chain.sh", "3", "--nodes=1", "--ntasks=1", SLURM / "train.sbatch", *FRAGILE,
         "name=a"],
        cwd=command.folder, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, second, third = done.stdout.split()
    cluster.wait(first, lambda: steps(command, "a") >= 3)
    cluster.run("scancel", "--signal=USR2", first)
    assert cluster.ended(first) == "FAILED"
    assert cluster.job(first)["ExitCode"] == "75:0"
    assert cluster.ended(second) == "COMPLETED"
    assert cluster.ended(third) == "CANCELLED"
    assert [record(command, "a", n)["outcome"] for n in (1, 2)] == ["preempted", "done"]
    assert command(*FRAGILE, "name=uninterrupted").returncode == 0
    assert same(command.folder / "runs/uninterrupted", command, "a")


@pytest.fixture
def sweep(cluster, command):
    """Start a sweep of two jobs, `a-seed=1` and `a-seed=2`, that Hydra submits to the cluster."""
    processes = []

    def start(*arguments, **env):
        env |= {"PATH": f"{cluster.state}/bin:{os.environ['PATH']}", "PERDURE_SLURM": str(SLURM)}
        paths = f"{command.env['PYTHONPATH']}:{SLURM.parent}"  # their first folder is not this one
        process = command.start(
            *FRAGILE, "-m", "seed=1,2", "name=a", "hydra/launcher=slurm",
            "hydra.launcher.partition=preemptible", *arguments,
            **env, PYTHONPATH=paths, OMP_NUM_THREADS="1",
        )  # fmt: skip
        processes.append(process)
        while not (jobs := cluster.run("squeue", "--noheader", "--format=%F").split()):
            assert process.poll() is None, process.communicate(timeout=60)
        return process, jobs[0]

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=60)


def test_hydra_sweep_requeues_only_the_stopped_task(cluster, command, sweep):
    process, job = sweep("hydra.launcher.tasks_per_node=2", STEP_S="0.2")
    cluster.wait(job, lambda: steps(command, "a-seed=2") >= 3)
    cluster.run("scancel", "--signal=USR2", f"{job}_1")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, (out, err)
    assert record(command, "a-seed=1", 1)["outcome"] == "done"
    assert record(command, "a-seed=2", 1)["outcome"] == "preempted"
    second = record(command, "a-seed=2", 2)
    assert (second["outcome"], second["restart"]) == ("done", "1")
    assert steps(command, "a-seed=1") == steps(command, "a-seed=2") == 40


def test_failed_sweep_job_is_reported_to_slurm_its_log_and_the_launcher(cluster, sweep):
    process, job = sweep(FAIL_AT="0:3")
    assert cluster.ended(f"{job}_0") == "FAILED"
    assert "ZeroDivisionError: a bug in the user's own code" in cluster.log(f"{job}_0")
    err = process.communicate(timeout=240)[1]
    assert process.returncode == 1
    assert "ZeroDivisionError: a bug in the user's own code" in err
