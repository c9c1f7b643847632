"""Jobs of a real SLURM: preempted, at their limit, on dead nodes, cancelled, failed, swept."""

import random
import re

import pytest
from support.slurm_jobs import FRAGILE, TWO_BY_TWO, record, same, steps, submit, undisturbed

__all__ = ["submit", "undisturbed"]


def test_a_preempted_job_is_requeued_and_ends_with_the_same_bits(
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


def test_a_storm_of_preemptions_ends_with_the_same_bits(cluster, command, submit):
    assert command(*FRAGILE, "name=whole", "launch.nproc=2").returncode == 0
    job = submit(
        *FRAGILE, "name=a", options=("--nodes=1", "--ntasks-per-node=2"), STEP_S="0.2"
    )  # fmt: skip
    lot, before = random.Random(7), 0
    for number in range(1, 11):
        goal = before + lot.randint(1, 3)
        cluster.wait(job, lambda goal=goal: steps(command, "a") >= goal)
        if number % 3 == 0:
            cluster.preempt()  # the real thing takes longer
        else:
            cluster.run("scancel", f"--signal={lot.choice(['USR2', 'TERM', 'USR1'])}", job)
        restarts = str(number)
        cluster.wait(job, lambda restarts=restarts: cluster.job(job)["Restarts"] == restarts)
        before = record(command, "a", number)["last_step"]
    assert cluster.ended(job) == "COMPLETED"
    assert "11 attempts (10 preempted): 100.0 % of 40 steps were useful" in cluster.log(job)
    assert same(command.folder / "runs/whole", command, "a")


def test_at_the_time_limit_a_job_leaves_in_time_and_is_requeued(cluster, command, submit):
    # no signal of SLURM's before the end, which it may send up to a minute early: only the deadline
    options = (*TWO_BY_TWO, "--time=1", "--signal=USR2@0")
    job = submit(*FRAGILE, "name=a", options=options, STEP_S="2.0")
    cluster.wait(job, lambda: cluster.job(job)["Restarts"] == "1")
    assert record(command, "a", 1)["outcome"] == "preempted"
    assert record(command, "a", 1)["reason"] == "deadline"
    cluster.wait(job, lambda: (command.folder / "runs/a/attempts/0002.json").exists())
    cluster.run("scancel", job)


def test_when_a_node_dies_the_job_goes_on_with_the_same_bits(cluster, command, submit, undisturbed):
    job = submit(*FRAGILE, "name=a", "launch.peer_timeout_s=5", STEP_S="0.3")
    cluster.wait(job, lambda: steps(command, "a") >= 7)
    cluster.fail("n2")
    cluster.wait(job, lambda: cluster.job(job)["JobState"] != "RUNNING")
    cluster.boot("n2")
    assert cluster.ended(job, 240) == "COMPLETED"
    assert int(cluster.job(job)["Restarts"]) >= 1
    assert same(undisturbed, command, "a")


@pytest.mark.parametrize(("how", "state"), [((), "CANCELLED"), (("--signal=TERM",), "COMPLETED")])
def test_a_cancelled_job_does_not_come_back_and_a_signalled_one_does(
    cluster, command, submit, how, state
):
    options = ("--nodes=1", "--ntasks-per-node=2")
    job = submit(*FRAGILE, "name=a", options=options, STEP_S="0.2")
    cluster.wait(job, lambda: steps(command, "a") >= 3)
    cluster.run("scancel", *how, job)
    assert cluster.ended(job) == state
    if how:
        assert cluster.job(job)["Restarts"] == "1"
        assert record(command, "a", 1)["outcome"] == "preempted"
        assert steps(command, "a") == 40


@pytest.mark.parametrize(("arguments", "env", "code", "says"), [
    (["trainer.max_epoch=3"], {}, "2:0", "did you mean 'max_epochs'"),
    ([], {"FAIL_AT": "1:3"}, "1:0", "ZeroDivisionError: a bug in the user's own code"),
])  # fmt: skip
def test_a_job_that_fails_for_good_is_not_requeued(
    cluster, command, submit, arguments, env, code, says
):
    options = ("--nodes=1", "--ntasks-per-node=2")
    job = submit(*FRAGILE, "name=a", *arguments, options=options, **env)
    assert cluster.ended(job) == "FAILED"
    found = cluster.job(job)
    assert (found["Restarts"], found["ExitCode"]) == ("0", code)
    assert says in cluster.log(job)


def test_under_torchrun_on_each_node_the_outcome_still_requeues_the_job(
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


def test_of_a_sweep_only_the_task_that_was_stopped_is_requeued(cluster, command, submit):
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


def test_where_requeueing_is_forbidden_the_log_says_how_to_go_on(cluster, command, submit):
    options = ("--nodes=1", "--ntasks=1", "--no-requeue")
    job = submit(*FRAGILE, "name=a", options=options, STEP_S="0.2")
    cluster.wait(job, lambda: steps(command, "a") >= 3)
    cluster.run("scancel", "--signal=USR2", job)
    assert cluster.ended(job) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "75:0"
    assert "Submit the same command again" in cluster.log(job)
    assert "slurm/chain.sh" in cluster.log(job)


def test_the_doctor_looks_first_and_a_job_that_cannot_work_ends_before_its_ranks(
    cluster, command, submit
):
    good = submit(*FRAGILE, "name=a", PERDURE_DOCTOR="yes")
    (command.folder / "runs" / "b").mkdir(parents=True)
    (command.folder / "runs" / "b" / "checkpoints").touch()  # where a folder has to be
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


def test_unequal_tasks_are_refused_with_the_reason(cluster, command, submit):
    job = submit(*FRAGILE, "name=a", options=("--nodes=2", "--ntasks=3", "--exclusive"))
    assert cluster.ended(job) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert re.search(r"started (2,1|1,2) tasks .*--ntasks-per-node", cluster.log(job))
