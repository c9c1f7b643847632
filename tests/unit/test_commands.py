"""python -m trainer lists the commands."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import perdure
from trainer import __main__ as listing
from trainer import protocols, run, task, top
from trainer.config.run_help import settings
from trainer.config.schema import Run


def test_listing_names_only_existing_commands(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["trainer"])
    assert listing.main() == 0
    names = re.findall(r"python -m (trainer\.\w+)", capsys.readouterr().out)
    assert len(names) == len(set(names)) >= 8
    for name in names:
        assert importlib.util.find_spec(name) is not None, name


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("typed", "hint"), [("exprt", "did you mean 'export'?"), ("xyz", "valid")])
def test_listing_unknown_command_suggests_the_closest(monkeypatch, capsys, typed, hint):
    monkeypatch.setattr("sys.argv", ["trainer", typed])
    assert listing.main() == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("main", [run.main, top.main])
def test_version_of_commands(capsys, main):
    assert main(["--version"]) == 0
    assert re.match(r"perdure \S+ \(Python 3\.\d+\.\S+, torch \d", capsys.readouterr().out)


@pytest.mark.parametrize(("main", "arguments", "setting"), [
    (run.main, ["--trainer.max_epochs", "3"], "trainer.max_epochs=3"),
    (run.main, ["-m", "--seed=1,2"], "seed=1,2"),
    (top.main, ["r", "--every-s", "5"], "every_s=5"),
])  # fmt: skip
def test_setting_written_as_a_flag_is_reported_without_dashes(capsys, main, arguments, setting):
    assert main(arguments) == 2
    assert f" have no dashes: {setting}" in capsys.readouterr().err


def test_shown_configuration_reports_an_unknown_choice(capsys):
    assert run.main(["--cfg", "job", "model=typo"]) == 2
    assert "no such choice: model=typo" in capsys.readouterr().err


def test_comma_without_multirun_shows_the_quoted_form(capsys):
    assert run.main(["init.weights=a,b"]) == 2
    assert "To give it as text: \"init.weights='a,b'\"" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["top", "--help"], ["run", "--version"], ["checkpoints", "x"]]
)
def test_perdure_command_equals_the_module_also_next_to_a_trainer_of_the_user(tmp_path, arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    commands = [
        ["-m", "perdure", *arguments],
        ["-m", f"trainer.{arguments[0]}", *arguments[1:]],
    ]
    module, reference = (
        subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
        )
        for command, folder in zip(commands, (tmp_path, ROOT), strict=True)
        if folder == ROOT or (folder / "trainer.py").write_text("import nothing\n")
    )
    assert module.returncode == reference.returncode
    assert module.stdout == reference.stdout
    assert module.stderr == reference.stderr


def test_perdure_starts_ranks_and_data_workers_next_to_a_trainer_of_the_user(tmp_path):
    (tmp_path / "trainer.py").write_text("import nothing\n")
    done = subprocess.run(
        [sys.executable, "-m", "perdure", "run", "data=synthetic", "sample.shape=[1,8,8]",
         "trainer.max_steps=2", "launch.nproc=2", "trainer.data_workers=1", "name=a"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Finished at step 2" in done.stdout


def test_perdure_exports_the_objects_of_trainer():
    assert perdure.Task is protocols.Task
    assert perdure.task is task
    assert {"Task", "checkpoint"} <= set(dir(perdure))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = perdure.nothing


def test_help_of_run_has_every_group_and_setting(capsys):
    assert run.main(["--help"]) == 0
    text = capsys.readouterr().out
    for path in (ROOT / "conf").glob("*/*.yaml"):
        assert re.search(rf"^  {path.parent.name} .*\b{path.stem}\b", text, re.MULTILINE)
    for key, _ in settings(Run):
        assert f"\n  {key}=" in text
    assert all(len(line) <= 100 for line in text.splitlines())
