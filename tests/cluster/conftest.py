"""A real SLURM of two nodes on this machine, for the tests of this folder."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest
from support.run_commands import ROOT, command

__all__ = ["command"]

SCRIPT = ROOT / "scripts" / "slurm_cluster"


def pytest_collection_modifyitems(items):
    """Mark all tests of this folder, which need SLURM and root."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


class Cluster:
    """Nodes n1 and n2, partitions `preemptible` and `urgent`, which preempts it."""

    def __init__(self, state: Path, nodes: int = 2, cpus: int = 8, **settings: str) -> None:
        self.state = state
        self._size = ("-N", str(nodes), "-c", str(cpus))
        self._nodes = nodes
        self._env = {
            **os.environ,
            "PERDURE_CLUSTER_STATE": str(state),
            **{f"PERDURE_CLUSTER_{key}": value for key, value in settings.items()},
        }
        self._env["PATH"] = f"{state}/bin:{os.environ['PATH']}"

    def __enter__(self) -> "Cluster":
        """Start the cluster and a guard process that stops it when this process ends.

        The guard waits for the end of its input, which the kernel closes with this process.
        """
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", 'cat; PERDURE_CLUSTER_STATE=$1 exec "$0" down', SCRIPT, self.state],
            start_new_session=True, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            self.manage("up", *self._size)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the cluster."""
        errors = self._guard.communicate(timeout=120)[1]
        assert self._guard.returncode == 0, errors

    def manage(self, *verb: str, code: int = 0) -> None:
        """Call the cluster script and check its exit code."""
        done = subprocess.run(
            [SCRIPT, *verb], env=self._env, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == code, done.stdout + done.stderr

    def run(self, *command: str, **more: object) -> str:
        """Run a SLURM command; return its output.

        On a busy machine munge may hang up on it, which ends it with SIGPIPE: it is run again.
        """
        for _ in range(5):
            done = subprocess.run(
                command, env=self._env, capture_output=True, text=True, timeout=60, **more
            )
            if done.returncode != -signal.SIGPIPE:
                break
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def sbatch(self, folder: Path, *arguments: str, **env: str) -> str:
        """Submit a batch script from a folder; return the job's id."""
        environment = {**self._env, "PERDURE_PYTHON": sys.executable, "PERDURE_DOCTOR": "no", **env}
        environment["PERDURE_SLURM"] = str(ROOT / "slurm")
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, name: str) -> dict[str, str]:
        """Return SLURM's description of a job or array task."""
        description = self.run("scontrol", "show", "--oneliner", "job", name)
        pairs = (word.partition("=") for word in description.split())
        return {key: value for key, _, value in pairs}

    def log(self, name: str) -> str:
        """Return the log of a job; empty before it starts."""
        path = Path(self.job(name)["StdOut"])
        return path.read_text() if path.exists() else ""

    def wait(self, name: str, condition: Callable[[], bool], within_s: float = 180.0) -> None:
        """Wait until a condition holds; fail after a timeout."""
        until = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > until:
                pytest.fail(f"condition never held; {self.job(name)}\n{self.log(name)[-6000:]}")
            time.sleep(0.1)

    def ended(self, name: str, within_s: float = 180.0) -> str:
        """Wait for a job to end; return its state, and print its log for a test that fails."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.wait(name, lambda: self.job(name)["JobState"] in over, within_s)
        print(self.log(name))
        return self.job(name)["JobState"]

    def preempt(self, nodes: int = 2) -> None:
        """Preempt the nodes with an urgent job of one second."""
        self.sbatch(
            Path("/tmp"), "--partition=urgent", f"--nodes={nodes}", "--exclusive",
            "--output=/dev/null", "--wrap=sleep 1",
        )  # fmt: skip

    def fail(self, node: str) -> None:
        """Cut a node's power."""
        self.manage("fail", node)

    def boot(self, node: str) -> None:
        """Boot a node whose power was cut."""
        self.manage("boot", node)

    def clear(self) -> None:
        """Make the cluster idle: restart it if it has a job or a failed node.

        A restart takes half a second. Cancelling a job that handles SIGTERM takes five seconds,
        and SLURM keeps a failed node's state even longer.
        """
        states = self.run("sinfo", "-h", "-N", "-p", "preemptible", "-o", "%T").split()
        if self.run("squeue", "--noheader") or states != ["idle"] * self._nodes:
            self.manage("down")
            self.manage("up", *self._size)


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    """The cluster of this test process, started once."""
    path = os.environ["PATH"] + ":/usr/sbin"
    if os.geteuid() != 0 or shutil.which("slurmctld", path=path) is None:
        pytest.skip("needs root, and: apt install slurmctld slurmd slurm-client munge iproute2")
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    with Cluster(Path(f"/run/perdure-{worker}-{os.getpid()}"), GRACE="20") as own_cluster:
        yield own_cluster


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The session's cluster, idle before and after the test."""
    session_cluster.clear()
    yield session_cluster
    session_cluster.clear()


@pytest.fixture
def another_cluster(session_cluster: Cluster) -> Iterator[Callable[..., Cluster]]:
    """Start further clusters for one test, with another size or other settings."""
    with ExitStack() as stack:
        numbers = count(1)

        def call(nodes: int = 2, cpus: int = 8, **settings: str) -> Cluster:
            state = Path(f"{session_cluster.state}-{next(numbers)}")
            return stack.enter_context(Cluster(state, nodes, cpus, **settings))

        yield call
