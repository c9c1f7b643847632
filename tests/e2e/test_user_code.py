"""A user's own model, Dataset, Task and configuration, with no change here."""

import re

import pytest
import torch
from safetensors.torch import load_file
from support.run_commands import HARD

MINE = """
# @package _global_
defaults:
  - override /model: mine
name: mine
sample: {shape: [4, 4], classes: 3}
data:
  _target_: trainer.data.source.Datasets
  train: {_target_: mine.data.Points, size: 60}
  eval: {_target_: mine.data.Points, size: 25}
task: {_target_: mine.task.Fragile}
trainer: {max_epochs: 2, global_batch_size: 10}
checkpoint: {metric: accuracy}
"""


def write_conf(folder):
    (folder / "my_conf/experiment").mkdir(parents=True)
    (folder / "my_conf/model").mkdir()
    (folder / "my_conf/experiment/mine.yaml").write_text(MINE)
    (folder / "my_conf/model/mine.yaml").write_text("_target_: mine.nets.Net\nwidth: 8\n")


def test_user_package_trains_resumes_and_exports(command):
    write_conf(command.folder)
    mine = ["--config-dir", "my_conf", "experiment=mine", "launch.nproc=2"]
    stopped = command(*mine, TERM_AT="1:4")
    assert stopped.returncode == 75, stopped.stderr
    assert command(*mine).returncode == 0
    exported = command("runs/mine", "step=best", module="trainer.export")
    assert exported.returncode == 0, exported.stderr
    (path,) = (command.folder / "runs/mine/exports").glob("*.safetensors")
    weights = load_file(path)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Linear(8, 3))
    net.load_state_dict({k.removeprefix("body."): v for k, v in weights.items()}, strict=True)


@pytest.mark.slow
def test_plain_dataset_trains_without_evaluation(command):
    done = command(
        "model._target_=mine.nets.Net", "~model.classes", "~model.input_shape", "++model.width=4",
        "data._target_=mine.data.Points", "trainer.max_steps=3",
        "trainer.global_batch_size=20", "name=plain",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"split": "eval"' not in (command.folder / "runs/plain/metrics.jsonl").read_text()


@pytest.mark.slow
def test_exported_weights_start_a_new_run(command):
    write_conf(command.folder)
    mine = ["--config-dir", "my_conf", "experiment=mine"]
    assert command(*mine, "name=first").returncode == 0
    assert command("runs/first", "out=w.safetensors", module="trainer.export").returncode == 0
    second = command(
        *mine, "name=second", "init.weights=w.safetensors", "optimizer.lr=0.0",
        "trainer.max_steps=1", "trainer.max_epochs=null",
    )  # fmt: skip
    assert second.returncode == 0, second.stderr
    assert command("runs/second", "out=v.safetensors", module="trainer.export").returncode == 0
    before, after = (load_file(command.folder / f"{n}.safetensors") for n in "wv")
    assert all(torch.equal(before[name], after[name]) for name in before)
    wrong = command(*mine, "name=third", "init.weights=w.safetensors", "model.width=9")
    assert wrong.returncode == 2
    assert "does not fit this model" in wrong.stderr


@pytest.mark.slow
def test_resume_path_forks_the_full_state_into_a_new_run(command):
    write_conf(command.folder)
    mine = ["--config-dir", "my_conf", "experiment=mine"]
    assert command(*mine, "name=first").returncode == 0
    forked = command(
        *mine, "name=second", "resume=runs/first", "optimizer.lr=0.5", "trainer.max_epochs=3"
    )
    assert forked.returncode == 0, forked.stderr
    assert "forking runs/first/checkpoints/step-00000012.0001 from step 12" in forked.stdout
    assert "optimizer.lr: 0.003 -> 0.5" in forked.stdout
    metrics = (command.folder / "runs/second/metrics.jsonl").read_text()
    assert '"lr": 0.5' in metrics
    assert '"step": 18' in metrics


@pytest.mark.slow
def test_sweep_gives_jobs_separate_directories_and_skips_finished_ones(command):
    write_conf(command.folder)
    sweep = ["--config-dir", "my_conf", "experiment=mine", "-m", "seed=1,2", "trainer.max_steps=2"]
    assert command(*sweep).returncode == 0
    assert sorted(p.name for p in (command.folder / "runs").iterdir()) == [
        "mine-seed=1",
        "mine-seed=2",
    ]
    again = command(*sweep)
    assert again.returncode == 0
    assert again.stdout.count("is finished") == 2
    assert sorted(p.name for p in command.folder.iterdir()) == ["my_conf", "runs"]


@pytest.mark.slow
def test_sweep_over_lists_names_each_job(command):
    done = command(*HARD, "name=a", "-m", "model.channels=[4,8],[4,4]", "trainer.max_steps=1")
    assert done.returncode == 0, done.stderr
    runs = sorted(path.name for path in (command.folder / "runs").iterdir())
    assert [re.sub("[0-9a-f]{8}$", "", name) for name in runs] == [
        "a-model.channels=4,4-", "a-model.channels=4,8-",
    ]  # fmt: skip


@pytest.mark.slow
def test_sweep_with_a_failing_job_runs_the_others_and_fails(command):
    write_conf(command.folder)
    failed = command(
        "--config-dir", "my_conf", "experiment=mine", "-m", "model.width=a,2", "trainer.max_steps=1"
    )
    assert failed.returncode == 2
    assert "'a' is not int" in failed.stderr
    assert [p.name for p in (command.folder / "runs").iterdir()] == ["mine-model.width=2"]
