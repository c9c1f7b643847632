"""Jobs on a real SLURM: preemption, time limit, node failure, cancellation, errors, sweeps."""

import random
import re
import sys
import time

import pytest
from support.slurm_jobs import (
    FRAGILE,
    TWO_BY_TWO,
    of_jobs,
    record,
    same,
    steps,
    submit,
    undisturbed,
)

__all__ = ["submit", "undisturbed"]


def test_preempted_job_is_requeued_and_ends_with_identical_results(
    cluster, command, submit, undisturbed
):
    job = submit(*FRAGILE, "name=a", STEP_S="0.2")
    cluster.wait(job, lambda: steps(command, "a") >= 3)
    cluster.preempt()
    assert cluster.ended(job) == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "1"
    first, second = record(command, "a", 1), record(command, "a", 2)
    assert (first["outcome"], second["outcome"]) == ("preempted", "done")
    assert first["reason"] in ("SIGUSR2", "SIGTERM")
    assert (first["job"], second["job"], second["restart"]) == (job, job, "1")
    assert second["first_step"] == first["last_step"]
    log = cluster.log(job)
    assert f"Stopped by {first['reason']} at step {first['last_step']}" in log
    assert f"resuming from step {first['last_step']}" in log
    assert "2 attempts (1 preempted): 100.0 % of 40 steps were useful" in log
    assert same(undisturbed, command, "a")


def test_ten_preemptions_end_with_identical_results(cluster, command, submit):
    assert command(*FRAGILE, "name=uninterrupted", "launch.nproc=2").returncode == 0
    job = submit(
        *FRAGILE, "name=a", options=("--nodes=1", "--ntasks-per-node=2"), STEP_S="0.2"
    )  # fmt: skip
    lot, before = random.Random(7), 0
    for number in range(1, 11):
        goal = before + lot.randint(1, 3)
        cluster.wait(job, lambda goal=goal: steps(command, "a") >= goal)
        if number % 3 == 0:
            cluster.preempt()  # slower than a signal, hence only every third time
        else:
            cluster.run("scancel", f"--signal={lot.choice(['USR2', 'TERM', 'USR1'])}", job)
        restarts = str(number)
        cluster.wait(job, lambda restarts=restarts: cluster.job(job)["Restarts"] == restarts)
        before = record(command, "a", number)["last_step"]
    assert cluster.ended(job) == "COMPLETED"
    assert "11 attempts (10 preempted): 100.0 % of 40 steps were useful" in cluster.log(job)
    assert same(command.folder / "runs/uninterrupted", command, "a")


def test_job_stops_before_its_time_limit_and_is_requeued(cluster, command, submit):
    # SLURM may signal up to a minute early; @0 disables that signal, so only the deadline acts
    options = (*TWO_BY_TWO, "--time=1", "--signal=USR2@0")
    job = submit(*FRAGILE, "name=a", options=options, STEP_S="2.0")
    cluster.wait(job, lambda: cluster.job(job)["Restarts"] == "1")
    assert record(command, "a", 1)["outcome"] == "preempted"
    assert record(command, "a", 1)["reason"] == "deadline"
    cluster.wait(job, lambda: (command.folder / "runs/a/attempts/0002.json").exists())
    cluster.run("scancel", job)


def test_job_after_node_failure_ends_with_identical_results(cluster, command, submit, undisturbed):
    job = submit(*FRAGILE, "name=a", "launch.peer_timeout_s=5", STEP_S="0.3")
    cluster.wait(job, lambda: steps(command, "a") >= 7)
    cluster.fail("n2")
    cluster.wait(job, lambda: cluster.job(job)["JobState"] != "RUNNING")
    cluster.boot("n2")
    assert cluster.ended(job, 240) == "COMPLETED"
    assert int(cluster.job(job)["Restarts"]) >= 1
    assert same(undisturbed, command, "a")


@pytest.mark.parametrize(("how", "state"), [((), "CANCELLED"), (("--signal=TERM",), "COMPLETED")])
def test_cancelled_job_is_not_requeued_and_signaled_job_is(cluster, command, submit, how, state):
    options = ("--nodes=1", "--ntasks-per-node=2")
    job = submit(*FRAGILE, "name=a", options=options, STEP_S="0.2")
    cluster.wait(job, lambda: steps(command, "a") >= 3)
    cluster.run("scancel", *how, job)
    assert cluster.ended(job) == state
    if how:
        assert cluster.job(job)["Restarts"] == "1"
        assert record(command, "a", 1)["outcome"] == "preempted"
        assert steps(command, "a") == 40


def test_job_signaled_while_its_ranks_start_is_requeued(cluster, command, submit):
    job = submit(*FRAGILE, "name=a", options=("--nodes=1", "--ntasks-per-node=2"))
    signaled = 0
    for restarts in range(3):

        def has_started(restarts=restarts):
            description = cluster.job(job)
            is_running = description["JobState"] == "RUNNING"
            return is_running and int(description["Restarts"]) == restarts

        cluster.wait(job, has_started)
        cluster.wait(job, lambda: f"{job}.0" in cluster.run("squeue", "-h", "-s", "-o", "%i"))
        time.sleep(0.7 * restarts)  # moments of the start: Python, imports, composition
        cluster.run("scancel", "--signal=USR2", job)
        signaled += 1
    assert cluster.ended(job) == "COMPLETED"
    restarts = int(cluster.job(job)["Restarts"])
    assert restarts >= signaled  # SLURM may end a step of the same number again, some time later
    assert cluster.log(job).count("ended with 75") == restarts
    assert steps(command, "a") == 40


SHELL = """#!/bin/bash
srun --ntasks=4 bash -c '[[ $SLURM_PROCID != 0 ]] || {python} -m trainer.run {arguments}'
"""


@pytest.mark.parametrize(("nproc", "code", "text"), [
    ("auto", "2:0", "1 of 4 ranks started; missing: ranks 1, 2, 3."), ("2", "0:0", ""),
])  # fmt: skip
def test_interactive_shell_names_missing_ranks_or_starts_its_own(
    cluster, command, nproc, code, text
):
    arguments = " ".join([*FRAGILE, "name=a", f"launch.nproc={nproc}"])
    script = command.folder / "shell.sh"
    script.write_text(SHELL.format(python=sys.executable, arguments=arguments))
    job = cluster.sbatch(
        command.folder, "--nodes=1", "--ntasks-per-node=4", str(script), **of_jobs(command)
    )
    cluster.ended(job)
    assert cluster.job(job)["ExitCode"] == code, cluster.log(job)
    assert text in cluster.log(job)
    assert "Traceback" not in cluster.log(job)
    if nproc != "auto":
        assert record(command, "a", 1)["world_size"] == 2


@pytest.mark.parametrize(("arguments", "env", "code", "message"), [
    (["trainer.max_epoch=3"], {}, "2:0", "did you mean 'max_epochs'"),
    ([], {"FAIL_AT": "1:3"}, "1:0", "ZeroDivisionError: a bug in the user's own code"),
])  # fmt: skip
def test_failed_job_is_not_requeued(cluster, command, submit, arguments, env, code, message):
    options = ("--nodes=1", "--ntasks-per-node=2")
    job = submit(*FRAGILE, "name=a", *arguments, options=options, **env)
    assert cluster.ended(job) == "FAILED"
    description = cluster.job(job)
    assert (description["Restarts"], description["ExitCode"]) == ("0", code)
    assert message in cluster.log(job)


def test_preempted_torchrun_job_is_requeued_and_ends_with_identical_results(
    cluster, command, submit, undisturbed
):
    options = ("--nodes=2", "--exclusive")
    job = submit(
        *FRAGILE, "name=a", script="torchrun.sbatch", options=options,
        PERDURE_NPROC="2", STEP_S="0.2",
    )  # fmt: skip
    cluster.wait(job, lambda: steps(command, "a") >= 3)
    cluster.run("scancel", "--signal=USR2", job)
    assert cluster.ended(job) == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "1"
    assert record(command, "a", 1)["outcome"] == "preempted"
    assert same(undisturbed, command, "a")


def test_sweep_requeues_only_the_stopped_task(cluster, command, submit):
    (command.folder / "rates.txt").write_text("optimizer.lr=0.1\noptimizer.lr=0.2\n")
    options = ("--array=0-1", "--nodes=1", "--ntasks=1")
    job = submit(
        "rates.txt", *FRAGILE, script="sweep.sbatch", options=options, STEP_S="0.2"
    )  # fmt: skip
    cluster.wait(f"{job}_1", lambda: steps(command, "rates-1") >= 3)
    cluster.run("scancel", "--signal=USR2", f"{job}_1")
    assert cluster.ended(f"{job}_0") == "COMPLETED"
    assert cluster.ended(f"{job}_1") == "COMPLETED"
    assert cluster.job(f"{job}_0")["Restarts"] == "0"
    assert cluster.job(f"{job}_1")["Restarts"] == "1"
    assert steps(command, "rates-0") == steps(command, "rates-1") == 40
    assert record(command, "rates-1", 1)["array_task"] == "1"


def test_job_with_no_requeue_logs_how_to_continue(cluster, command, submit):
    options = ("--nodes=1", "--ntasks=1", "--no-requeue")
    job = submit(*FRAGILE, "name=a", options=options, STEP_S="0.2")
    cluster.wait(job, lambda: steps(command, "a") >= 3)
    cluster.run("scancel", "--signal=USR2", job)
    assert cluster.ended(job) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "75:0"
    assert "Submit the same command again" in cluster.log(job)
    assert "slurm/chain.sh" in cluster.log(job)


def test_doctor_runs_first_and_its_failure_ends_the_job_before_its_ranks(cluster, command, submit):
    good = submit(*FRAGILE, "name=a", PERDURE_DOCTOR="yes")
    (command.folder / "runs" / "b").mkdir(parents=True)
    (command.folder / "runs" / "b" / "checkpoints").touch()  # a file where a folder is needed
    bad = submit(*FRAGILE, "run_dir=runs/b/checkpoints/x", PERDURE_DOCTOR="yes")
    assert cluster.ended(bad) == "FAILED"
    assert "FAIL  run_dir" in cluster.log(bad)
    assert "attempt 1" not in cluster.log(bad)
    assert cluster.ended(good) == "COMPLETED"
    log = cluster.log(good)
    assert "No problem found" in log
    assert re.search(r"ok +signal +the job is signaled 180 s before its time limit", log)
    assert re.search(r"ok +requeue +this job can be requeued", log)
    assert re.search(r"ok +preemption +PreemptMode=REQUEUE in preemptible", log)
    assert re.search(r"\d+ s between the signal and SIGKILL \(GraceTime \d+, KillWait \d+\)", log)


def test_unequal_tasks_per_node_are_rejected_with_the_option_to_set(cluster, command, submit):
    job = submit(*FRAGILE, "name=a", options=("--nodes=2", "--ntasks=3", "--exclusive"))
    assert cluster.ended(job) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert re.search(r"started (2,1|1,2) tasks .*--ntasks-per-node", cluster.log(job))
