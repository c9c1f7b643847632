"""A real SLURM of two nodes on this machine, for the tests of this folder."""

import os
import shutil
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
    """Everything here needs SLURM and root."""
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
        """Start it, and what stops it however this process ends: a pipe's end closes with us."""
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
        """Stop it."""
        said = self._guard.communicate(timeout=120)[1]
        assert self._guard.returncode == 0, said

    def manage(self, *verb: str, code: int = 0) -> None:
        """Call the cluster's own script, which must end with this exit code."""
        done = subprocess.run(
            [SCRIPT, *verb], env=self._env, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == code, done.stdout + done.stderr

    def run(self, *command: str, **more: object) -> str:
        """Run a SLURM command; return what it printed."""
        done = subprocess.run(
            command, env=self._env, capture_output=True, text=True, timeout=60, **more
        )
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
        """Return what SLURM says of a job, or of an array's task."""
        shown = self.run("scontrol", "show", "--oneliner", "job", name)
        pairs = (word.partition("=") for word in shown.split())
        return {key: value for key, _, value in pairs}

    def log(self, name: str) -> str:
        """Return what a job has printed."""
        path = Path(self.job(name)["StdOut"])
        return path.read_text() if path.exists() else ""

    def wait(self, name: str, condition: Callable[[], bool], within_s: float = 180.0) -> None:
        """Wait for a condition, for a bounded time."""
        until = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > until:
                pytest.fail(f"it never came true; {self.job(name)}\n{self.log(name)[-6000:]}")
            time.sleep(0.1)

    def ended(self, name: str, within_s: float = 180.0) -> str:
        """Wait for a job to end; return its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.wait(name, lambda: self.job(name)["JobState"] in over, within_s)
        return self.job(name)["JobState"]

    def preempt(self, nodes: int = 2) -> None:
        """Have an urgent job take the nodes, for a moment."""
        self.sbatch(
            Path("/tmp"), "--partition=urgent", f"--nodes={nodes}", "--exclusive",
            "--output=/dev/null", "--wrap=sleep 1",
        )  # fmt: skip

    def fail(self, node: str) -> None:
        """Cut a node's power."""
        self.manage("fail", node)

    def boot(self, node: str) -> None:
        """Switch it on again."""
        self.manage("boot", node)

    def clear(self) -> None:
        """Make it idle: a new one, where a job or a dead node is left. That takes half a second.

        To cancel a job that handles SIGTERM takes five, and what SLURM remembers of a dead node
        lasts longer.
        """
        states = self.run("sinfo", "-h", "-N", "-p", "preemptible", "-o", "%T").split()
        if self.run("squeue", "--noheader") or states != ["idle"] * self._nodes:
            self.manage("down")
            self.manage("up", *self._size)


@pytest.fixture(scope="session")
def whole_cluster() -> Iterator[Cluster]:
    """A cluster of its own for each process of tests."""
    path = os.environ["PATH"] + ":/usr/sbin"
    if os.geteuid() != 0 or shutil.which("slurmctld", path=path) is None:
        pytest.skip("needs root, and: apt install slurmctld slurmd slurm-client munge iproute2")
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    with Cluster(Path(f"/run/perdure-{worker}-{os.getpid()}"), GRACE="20") as made:
        yield made


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, idle before and after."""
    whole_cluster.clear()
    yield whole_cluster
    whole_cluster.clear()


@pytest.fixture
def another_cluster(whole_cluster: Cluster) -> Iterator[Callable[..., Cluster]]:
    """Start one beside it, of another size or with other settings, for one test."""
    with ExitStack() as all_of_them:
        numbers = count(1)

        def call(nodes: int = 2, cpus: int = 8, **settings: str) -> Cluster:
            state = Path(f"{whole_cluster.state}-{next(numbers)}")
            return all_of_them.enter_context(Cluster(state, nodes, cpus, **settings))

        yield call
