"""Commands do not import what they do not need: torch and torchmetrics each take seconds."""

import os
import re
import subprocess
import sys

import pytest
import torch

from trainer import checkpoint
from trainer.__main__ import COMMANDS
from trainer.checkpoint import Content, lineage
from trainer.cluster.world import World
from trainer.storage import LocalStore

_SLOW = {"torch", "torchmetrics", "numpy"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a checkpoint, a metrics file and an orphaned checkpoint folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    store = LocalStore(folder)
    attempt = lineage.begin(store, {"host": "a", "started": "2026-01-01T00:00:00+00:00"})
    writer = checkpoint.Writer(store, World(), attempt)
    content = Content(tensors={"model.weight": torch.ones(3)}, objects={"run": {"step": 1}})
    checkpoint.save(writer, content, step=1)
    lineage.amend(store, attempt, {"ended": "2026-01-02T00:00:00+00:00", "outcome": "finished"})
    orphan = folder / "checkpoints/step-00000002.0001"
    orphan.mkdir()
    (orphan / "rank-00000-of-00001.safetensors").write_bytes(b"unfinished")
    (folder / "config.yaml").write_text("name: run\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    return folder


def slow_imports(*command, code=0):
    """Run a command; return its output or error, and the slow packages that it imported."""
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *command],
        capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"}, check=False,
    )  # fmt: skip
    assert process.returncode == code, process.stderr[-2000:]
    imported = re.findall(r"^import time:.*\| +(\S+)$", process.stderr, re.MULTILINE)
    assert "trainer.errors" in imported  # importtime reports what this test reads
    return process.stdout or process.stderr, _SLOW & set(imported)


@pytest.fixture
def in_runs(run, monkeypatch):
    """Commands run in the folder of the run, and import this checkout."""
    monkeypatch.chdir(run.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


@pytest.mark.usefixtures("in_runs")
@pytest.mark.parametrize("prefix", ["trainer.", "perdure "])
@pytest.mark.parametrize("command", [
    "checkpoints list run", "checkpoints list run --json", "checkpoints show run",
    "checkpoints show run step=1 --json", "top run --once", "top . --json",
    "report run out=page.html",
])  # fmt: skip
def test_reading_commands_do_not_import_torch(prefix, command):
    output, imported = slow_imports(*f"{prefix}{command}".split())
    assert not imported
    assert output


@pytest.mark.usefixtures("in_runs")
def test_prune_lists_what_it_would_delete_without_torch(run):
    assert slow_imports("trainer.checkpoints", "prune", "run", code=2)[1] == set()
    assert (run / "checkpoints/step-00000002.0001").exists()


INFORMATION = [
    "trainer", "perdure", "trainer --version",
    *(f"trainer.{name} --help" for name in COMMANDS),
    *(f"perdure {name} --version" for name in COMMANDS),
]  # fmt: skip


@pytest.mark.usefixtures("in_runs")
@pytest.mark.parametrize("command", INFORMATION)
def test_help_and_version_do_not_import_torch(command):
    output, imported = slow_imports(*command.split())
    assert not imported
    assert ("perdure " if "--version" in command else "python -m trainer") in output


@pytest.mark.usefixtures("in_runs")
def test_path_that_does_not_exist_is_rejected_without_torch():
    error, imported = slow_imports("trainer.checkpoints", "show", "rum", code=2)
    assert "error: rum does not exist" in error
    assert not imported


@pytest.mark.usefixtures("in_runs")
@pytest.mark.parametrize("command", ["run", "doctor"])
@pytest.mark.parametrize(("arguments", "hint"), [
    (["trainer.max_epoch=3"], "did you mean 'max_epochs'?"),
    (["lr=0.1", "data=synthetic"], "did you mean 'optimizer.lr'?"),
    (["model=cmn"], "did you mean 'cnn'?"),
])  # fmt: skip
def test_misspelt_keys_and_choices_are_rejected_without_torch(command, arguments, hint):
    error, imported = slow_imports(f"trainer.{command}", *arguments, code=2)
    assert hint in error
    assert not imported


@pytest.mark.slow
@pytest.mark.usefixtures("in_runs")
def test_run_reports_all_problems_together_if_a_target_has_to_be_looked_up():
    error, imported = slow_imports("trainer.run", "seeed=1", "model.hiden=3", code=2)
    assert "did you mean 'seed'?" in error
    assert "did you mean 'hidden'?" in error
    assert "torch" in imported


QUIET = """
import torch

class Quiet:
    eval = None

    def __init__(self):
        self.train = torch.utils.data.TensorDataset(torch.zeros(8, 1, 8, 8), torch.arange(8))
"""


@pytest.mark.usefixtures("in_runs")
def test_training_and_resume_without_evaluation_data_do_not_import_torchmetrics(run):
    (run.parent / "quiet.py").write_text(QUIET)
    for steps in (2, 4):
        output, imported = slow_imports(
            "trainer.run", "~data", "+data._target_=quiet.Quiet", "trainer.global_batch_size=4",
            "sample.shape=[1,8,8]", f"trainer.max_steps={steps}", "run_dir=quiet", "name=quiet",
        )  # fmt: skip
        assert f"Finished at step {steps}" in output
        assert imported == {"torch", "numpy"}
    assert "step 2" in output  # from which it resumed


@pytest.mark.usefixtures("in_runs")
def test_check_of_the_default_configuration_does_not_import_torchmetrics():
    assert "torchmetrics" not in slow_imports("trainer.run", "--check")[1]


@pytest.mark.slow
@pytest.mark.usefixtures("in_runs")
@pytest.mark.parametrize("verb", ["verify", "diff"])
def test_verbs_that_read_tensors_import_torch_on_use(verb):
    arguments = ["step=1,1"] if verb == "diff" else []
    assert "torch" in slow_imports("trainer.checkpoints", verb, "run", *arguments)[1]


@pytest.mark.parametrize("name", ["Content", "DamagedError", "PendingSave", "Reader", "Writer"])
def test_names_of_the_checkpoint_package_are_imported_on_use(name):
    assert name in checkpoint.__all__
    assert getattr(checkpoint, name).__name__ == name


def test_checkpoint_package_rejects_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'Raeder'"):
        checkpoint.Raeder  # noqa: B018
