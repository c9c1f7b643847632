"""python -m trainer.evaluate returns the metrics that the run logged."""

import json
import os
import shutil
import sys
import textwrap
from dataclasses import replace

import pytest

from trainer import evaluate
from trainer.checkpoint.manifest import from_bytes, to_bytes

RUN = [
    "data=digits", "model=mlp", "optimizer=adam", "trainer.max_epochs=2", "launch.threads=1",
    "checkpoint.metric=accuracy", "checkpoint.keep_last=5", "trainer.ema_decay=0.9",
]  # fmt: skip


def evaluated(command):
    lines = (command.folder / "runs/a/metrics.jsonl").read_text().splitlines()
    evaluations = [line for line in map(json.loads, lines) if line["split"] == "eval"]
    return {line["step"]: {k: line[k] for k in ("loss", "accuracy")} for line in evaluations}


@pytest.fixture
def measure(command, capsys, monkeypatch):
    """Call the command in the run's folder; return (code, stdout, stderr)."""
    monkeypatch.chdir(command.folder)
    for folder in reversed(command.env["PYTHONPATH"].split(os.pathsep)):
        monkeypatch.syspath_prepend(folder)

    def call(*arguments, location="runs/a"):
        code = evaluate.main([location, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield call
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def test_evaluate_returns_the_metrics_of_the_run(command, measure):
    assert command(*RUN, "name=a").returncode == 0

    def measured(*arguments):
        code, out, err = measure("--json", *arguments)
        assert code == 0, err
        return json.loads(out)

    by_step = evaluated(command)
    last = max(by_step)
    newest = measured()
    assert newest["step"] == last
    assert newest["weights"] == "ema"
    assert newest["metrics"] == pytest.approx(by_step[last], rel=1e-6)
    first = measured(f"step={min(by_step)}")
    assert first["metrics"] == pytest.approx(by_step[min(by_step)], rel=1e-6)
    other = measured("weights=model", "trainer.eval_batch_size=7")
    assert other["metrics"]["loss"] != pytest.approx(newest["metrics"]["loss"], rel=1e-4)
    assert other["samples"] == newest["samples"] > 100
    assert f"runs/a at step {last:,}, averaged weights" in measure()[1]
    for arguments, text in (
        (["model=cnn"], "only data and task can be replaced after the run"),
        (["data=digitz"], "did you mean 'digits'"),
        (["--config-dir", "nowhere"], "--config-dir 'nowhere' is not a directory"),
        (["step=7"], "no checkpoint of that step"),
        (["weights=emma"], "did you mean 'ema'"),
        (["trainer.evil=1"], "no such key"),
        (["model.hidden=3"], "model.hidden"),
        (["--jsn"], "did you mean '--json'"),
    ):
        code, _, err = measure(*arguments)
        assert (code, text in err) == (2, True), err


def test_evaluate_with_config_dir_chooses_the_users_groups(command, measure):
    assert command(*RUN, "name=a", "trainer.max_steps=2").returncode == 0
    groups = {
        "data/other": """
            _target_: trainer.data.synthetic.Synthetic
            shape: ${sample.shape}
            classes: ${sample.classes}
            eval_samples: 30
            """,
        "task/own": "_target_: mine.task.Fragile",
    }
    for name, text in groups.items():
        path = command.folder / f"my_conf/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    for flag in (["--config-dir", "my_conf"], ["--config-dir=my_conf"]):
        code, out, err = measure("--json", *flag, "data=other", "task=own")
        assert code == 0, err
        assert json.loads(out)["samples"] == 30
        assert "mine.task" in sys.modules
    few = json.loads(measure("--json", *flag, "data=other", "data.eval_samples=20")[1])
    assert few["samples"] == 20
    assert json.loads(measure("--json", *flag)[1])["samples"] > 30  # the run's own data
    code, _, err = measure(*flag, "data=othr")
    assert (code, "did you mean 'other'" in err) == (2, True), err


USER_TASK = [
    "data=synthetic", "sample.shape=[1,8,8]", "model=mlp", "name=a", "trainer.max_steps=2",
    "task._target_=mine.task.Fragile", "checkpoint.mirror=mirror",
]  # fmt: skip


def test_evaluate_asks_for_user_targets_of_runs_that_the_user_did_not_start(command, measure):
    done = command(*USER_TASK)
    assert done.returncode == 0, done.stderr
    folder = command.folder
    shutil.copytree(folder / "runs/a", folder / "copy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "another user"))
        assert measure()[0] == 2
    for location in ("copy", "copy/checkpoints"):
        code, _, err = measure(location=location)
        assert code == 2
        assert "allow=mine.task.Fragile" in err
    assert "mine" not in sys.modules
    code, out, err = measure("allow=mine", location="copy")
    assert code == 0, err
    assert "accuracy" in out


def test_evaluate_does_not_ask_for_targets_of_a_run_that_the_user_started(command, measure):
    done = command(*USER_TASK)
    assert done.returncode == 0, done.stderr
    (command.folder / "link").symlink_to("runs")
    (checkpoint,) = (command.folder / "runs/a/checkpoints").iterdir()
    for location in ("runs/a", "link/a", "runs/a/checkpoints", checkpoint, "mirror"):
        code, out, err = measure(location=str(location))
        assert (code, "accuracy" in out) == (0, True), err


@pytest.mark.parametrize("key", ["task", "model"])
def test_evaluate_asks_again_if_the_recorded_configuration_was_edited(command, measure, key):
    done = command(*USER_TASK)
    assert done.returncode == 0, done.stderr
    (path,) = (command.folder / "runs/a/checkpoints").glob("*/manifest.json")
    manifest = from_bytes(path.read_bytes(), str(path))
    config = {**manifest.config, key: {"_target_": "os.system", "command": "touch hacked"}}
    path.write_bytes(to_bytes(replace(manifest, config=config)))
    code, _, err = measure()
    assert (code, "allow=" in err, "os.system" in err) == (2, True, True)
    assert not (command.folder / "hacked").exists()


def test_evaluate_as_a_process_prints_metrics(command):
    assert command(*RUN, "name=a", "trainer.max_steps=2").returncode == 0
    done = command("runs/a", module="trainer.evaluate")
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
