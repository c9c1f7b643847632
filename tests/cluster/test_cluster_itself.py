"""The tests' SLURM cluster: operation, cleanup, and two clusters at once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.run_commands import ROOT


def processes_of(state):
    """Return the commands of all processes whose initial environment names a cluster's folder."""
    commands = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"={state}\0".encode() in (folder / "environ").read_bytes() + b"\0":
                commands.append((folder / "cmdline").read_bytes())
        except OSError:  # it has ended
            continue
    return [command for command in commands if command]  # a zombie has none


def machine_state():
    """Return the network links, mounts and hosts file of this machine."""
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True)
    names = [line.split(":")[1] for line in links.stdout.splitlines()]
    return names, Path("/proc/self/mountinfo").read_text(), Path("/etc/hosts").read_text()


def wait(condition, within_s=30.0):
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_job_runs_on_two_nodes_and_down_leaves_nothing_behind(another_cluster, tmp_path):
    before = machine_state()
    cluster = another_cluster(GPUS="2")
    job = cluster.sbatch(
        tmp_path, "--nodes=2", "--gpus-per-node=2",
        "--wrap=srun sh -c 'echo $(hostname) $CUDA_VISIBLE_DEVICES'",
    )  # fmt: skip
    assert cluster.ended(job) == "COMPLETED"
    assert sorted(cluster.log(job).split("\n")) == ["", "n1 0,1", "n2 0,1"]

    stubborn = "trap '' TERM; setsid sleep 1000 & touch up; wait"
    job = cluster.sbatch(tmp_path, f"--wrap={stubborn}")
    cluster.wait(job, (tmp_path / "up").exists)
    assert len(processes_of(cluster.state)) > 5
    cluster.manage("down")
    assert processes_of(cluster.state) == []
    assert not cluster.state.exists()
    assert machine_state() == before
    cluster.manage("status", code=3)
    cluster.manage("down")


def test_preempted_job_is_requeued_with_its_id(another_cluster, tmp_path):
    cluster = another_cluster(GRACE="0", KILLWAIT="1")
    job = cluster.sbatch(
        tmp_path, "--nodes=2", "--open-mode=append",
        "--wrap=echo attempt $SLURM_RESTART_COUNT; [ -n \"$SLURM_RESTART_COUNT\" ] || sleep 1000",
    )  # fmt: skip
    cluster.wait(job, lambda: "attempt" in cluster.log(job))
    cluster.preempt()
    assert cluster.ended(job) == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "1"
    assert [line for line in cluster.log(job).split("\n") if "attempt" in line] == [
        "attempt", "attempt 1"
    ]  # fmt: skip
    assert "DUE TO PREEMPTION" in cluster.log(job)


def test_two_clusters_run_concurrently(cluster, another_cluster, tmp_path):
    other = another_cluster(nodes=1, cpus=3)
    jobs = [slurm.sbatch(tmp_path, "--output=/dev/null", "--wrap=sleep 1000")
            for slurm in (cluster, other)]  # fmt: skip
    for slurm, job in zip((cluster, other), jobs, strict=True):
        slurm.wait(job, lambda slurm=slurm, job=job: slurm.job(job)["JobState"] == "RUNNING")
        assert slurm.job(job)["BatchHost"] == "n1"
    assert other.run("sinfo", "-h", "-p", "urgent", "-o", "%D %c") == "1 3"
    other.manage("down")
    cluster.manage("status")
    assert cluster.job(jobs[0])["JobState"] == "RUNNING"


def test_failed_nodes_return(cluster):
    def check_reachable(expected):
        probe = "exec 2>/dev/null; timeout 1 bash -c '>/dev/tcp/n2/6818'"
        cluster.manage("exec", "-n", "n1", "bash", "-c", probe, code=0 if expected else 124)

    check_reachable(True)
    cluster.manage("unplug", "n2")
    check_reachable(False)
    cluster.manage("plug", "n2")
    check_reachable(True)
    cluster.manage("slurmd-kill", "n2")
    cluster.manage("status", code=1)
    cluster.manage("slurmd-start", "n2")
    cluster.fail("n1")
    cluster.manage("status", code=1)
    cluster.boot("n1")
    cluster.manage("fail", "n3", code=1)
    cluster.clear()
    assert cluster.run("srun", "--nodes=2", "hostname").split() in (["n1", "n2"], ["n2", "n1"])


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_cluster_ends_with_the_process_that_started_it(session_cluster, how):
    state, folder = Path(f"{session_cluster.state}-{how}"), Path(__file__).parent
    program = (  # of several files of that name, this folder's comes first
        f"import os, signal, sys; sys.path[:0] = {[str(folder), *sys.path]!r}\n"
        f"from pathlib import Path\nfrom conftest import Cluster\n"
        f"with Cluster(Path({str(state)!r}), nodes=1) as cluster:\n"
        f"    print(cluster.state.exists(), flush=True)\n"
        f"    os.kill(os.getpid(), signal.{how})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "True\n", done.stderr
    wait(lambda: not state.exists())
    wait(lambda: processes_of(state) == [])


def test_failed_start_reports_its_cause_and_leaves_nothing_behind(session_cluster, another_cluster):
    with pytest.raises(AssertionError, match="unrecognized key: Nonsense"):
        another_cluster(EXTRA="Nonsense=1")
    state = Path(f"{session_cluster.state}-1")
    assert not state.exists()
    wait(lambda: processes_of(state) == [])


def test_interrupted_start_leaves_nothing_behind(session_cluster):
    state = Path(f"{session_cluster.state}-interrupted")
    starting = subprocess.Popen(
        [ROOT / "scripts/slurm_cluster", "up"],
        env={**os.environ, "PERDURE_CLUSTER_STATE": str(state)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait((state / "pid" / "munged").exists)
    starting.terminate()
    assert starting.wait(60) != 0
    assert not state.exists()
    wait(lambda: processes_of(state) == [])
