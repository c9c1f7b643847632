"""The complete project in the documents: checked, trained, resumed, evaluated and exported."""

import re

import pytest
import torch
from safetensors.torch import load_file
from support.run_commands import ROOT, Command

from scripts.compare_runs import differences

PAGE = (ROOT / "docs/own_project.md").read_text()
FILES = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
EXPERIMENT = ["--config-dir", "my_conf", "experiment=count"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the files of the page; runs trainer.run there."""
    command = Command(tmp_path_factory.mktemp("project"))
    for name, text in FILES.items():
        path = command.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return command


def test_files_have_sixty_lines():
    lines = [line for text in FILES.values() for line in text.splitlines() if line.strip()]
    assert sorted(FILES) == ["mine/data.py", "mine/nets.py", "mine/task.py",
                             "my_conf/experiment/count.yaml"]  # fmt: skip
    assert len(lines) <= 60


@pytest.mark.slow
def test_check_accepts_the_project_and_writes_nothing(project):
    done = project(*EXPERIMENT, "--check=run", "launch.nproc=2")
    assert done.returncode == 0, done.stderr
    assert not (project.folder / "runs").exists()


@pytest.mark.slow
def test_project_resumes_exactly_and_its_metric_is_that_of_all_samples(project):
    arguments = [*EXPERIMENT, "launch.nproc=2", "launch.threads=1"]
    full = project(*arguments, "name=full")
    assert full.returncode == 0, full.stderr
    exact = float(re.search(r"Finished .* exact (\S+)", full.stdout)[1])
    assert exact > 0.9
    assert project(*arguments, "name=a", "trainer.max_steps=70").returncode == 0
    assert project(*arguments, "name=a").returncode == 0
    runs = project.folder / "runs"
    changes = differences(str(runs / "full"), str(runs / "a"))
    assert [change for change in changes if "tensor" in change] == []
    evaluated = project("runs/full", "allow=[mine.*]", module="trainer.evaluate")
    assert evaluated.returncode == 0, evaluated.stderr
    assert float(re.search(r"exact\s+(\S+)", evaluated.stdout)[1]) == pytest.approx(exact, abs=1e-4)
    exported = project("runs/full", "out=w.safetensors", module="trainer.export")
    assert exported.returncode == 0, exported.stderr
    weights = load_file(project.folder / "w.safetensors")
    assert {name: tuple(t.shape) for name, t in weights.items()}["embed.weight"] == (10, 32)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
