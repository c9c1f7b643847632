"""python -m trainer.evaluate returns the metrics that the run logged."""

import json
import os
import sys
import textwrap

import pytest

from trainer import evaluate

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

    def call(*arguments):
        code = evaluate.main(["runs/a", *arguments])
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


def test_evaluate_calls_a_user_task_only_if_allowed(command, measure):
    done = command(
        "data=synthetic", "sample.shape=[1,8,8]", "model=mlp", "name=a", "trainer.max_steps=2",
        "task._target_=mine.task.Fragile",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    code, _, err = measure()
    assert code == 2
    assert "allow=mine.task.Fragile" in err
    assert "mine" not in sys.modules
    code, out, err = measure("allow=mine")
    assert code == 0, err
    assert "accuracy" in out


def test_evaluate_as_a_process_prints_metrics(command):
    assert command(*RUN, "name=a", "trainer.max_steps=2").returncode == 0
    done = command("runs/a", module="trainer.evaluate")
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
