"""Documented commands that need SLURM, run with one task in place of eight."""

import json
import os
import re
import subprocess
import sys

import pytest
from support import documents
from support.slurm_jobs import SLURM, of_jobs

COMMANDS = [
    words for document in documents.DOCUMENTS for words in documents.typed(document, "slurm")
]


@pytest.fixture
def with_gpus(another_cluster):
    """A cluster whose nodes are configured with eight GPUs."""
    return another_cluster(GPUS="8")


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: f"{words[0]}-{words[-1]}")
def test_document_command_runs(with_gpus, command, words):
    cluster = with_gpus
    (command.folder / "slurm").symlink_to(SLURM)
    (command.folder / "sweep.txt").write_text("".join(f"seed={n}\n" for n in range(5)))
    env, started = documents.to_run(
        words if "trainer.doctor" in words else documents.shorter(words), ranks=1
    )
    paths = of_jobs(command)
    if "-m" in words:  # a job that Hydra submits finds this project by its path alone
        paths["PYTHONPATH"] += f":{SLURM.parent}"
    env |= {**cluster._env, **paths, "PERDURE_PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"}
    env["PATH"] = f"{os.path.dirname(sys.executable)}:{env['PATH']}"
    done = subprocess.run(
        started, cwd=command.folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "trainer.doctor" in words:
        assert re.search(r"ok +shared +all ranks share run_dir", done.stdout)
        assert re.search(r"ok +all-reduce", done.stdout)
        return
    jobs = re.findall(r"^(?:Submitted batch job )?(\d+)$", done.stdout, re.MULTILINE)
    for job in jobs:
        cluster.wait(job, lambda: not cluster.run("squeue", "--noheader"), 240)
    records = sorted((command.folder / "runs").glob("*/attempts/????.json"))
    outcomes = [json.loads(path.read_text())["outcome"] for path in records]
    assert outcomes == ["done"] * (3 if "-m" in words else 5 if "--array=0-4%2" in words else 1)
