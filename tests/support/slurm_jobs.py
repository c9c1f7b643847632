"""Jobs of training runs, and what they left behind."""

import json

import pytest
from support.run_commands import HARD, ROOT, in_folder

from scripts.compare_runs import differences

FRAGILE = [*HARD, "task._target_=mine.task.Fragile"]
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--exclusive")
SLURM = ROOT / "slurm"


def submitter(cluster, command):
    """Return what submits a batch script of the project with overrides, in the command's folder."""

    def submit(*arguments, script="train.sbatch", options=TWO_BY_TWO, **env):
        return cluster.sbatch(
            command.folder, *options, str(SLURM / script), *arguments, **{**of_jobs(command), **env}
        )

    return submit


def of_jobs(command):
    # a sandbox without the user's environment would not find his package
    return {"PYTHONPATH": command.env["PYTHONPATH"], "OMP_NUM_THREADS": "1"}


@pytest.fixture
def submit(cluster, command):
    return submitter(cluster, command)


def record(command, name, number):
    return json.loads((command.folder / f"runs/{name}/attempts/{number:04d}.json").read_text())


def steps(command, name):
    path = command.folder / f"runs/{name}/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The folder of FRAGILE, run on four ranks without anything in its way."""
    command = in_folder(tmp_path_factory.mktemp("undisturbed"))
    done = command(*FRAGILE, "name=uninterrupted", "launch.nproc=4")
    assert done.returncode == 0, done.stderr
    return command.folder / "runs/uninterrupted"


def same(run, command, name):
    return differences(str(run), str(command.folder / "runs" / name)) == []
