"""The larger test, on Fashion-MNIST: 60,000 real images, two ranks, killed on the way."""

import re

import pytest

from scripts.compare_runs import differences

DATA = "/usr/share/datasets/fashion-mnist"


@pytest.mark.cluster
def test_two_ranks_killed_in_the_second_epoch_end_well_and_the_same(command):
    arguments = [
        "data=mnist", f"data.dir={DATA}", "data.mean=0.2860", "data.std=0.3530", "model=mlp",
        "trainer.max_epochs=3", "trainer.global_batch_size=128", "launch.nproc=2",
        "launch.threads=1", "scheduler=cosine", "checkpoint.every_steps=600",
        "checkpoint.metric=accuracy", "optimizer.lr=0.001", "task._target_=mine.task.Fragile",
    ]  # fmt: skip
    undisturbed = command(*arguments, "name=a")
    assert undisturbed.returncode == 0, undisturbed.stderr
    accuracy = float(re.search(r"Finished .* accuracy (\S+)", undisturbed.stdout)[1])
    assert accuracy >= 0.86
    saved = "runs/b/checkpoints/step-00000600.*/manifest.json"
    assert command(*arguments, "name=b", DIE_AT="1:700", DIE_AFTER=saved).returncode != 0
    went_on = command(*arguments, "name=b")
    assert went_on.returncode == 0, went_on.stderr
    assert "resuming from step 600; 804 steps left" in went_on.stdout
    runs = command.folder / "runs"
    assert differences(str(runs / "a"), str(runs / "b")) == []
