"""Runs of the last commit before trainer/ had folders (bfff245) resume, evaluate and export.

tests/golden/flat_layout_run has, for 1 and 2 ranks, a run that was killed in the middle of an epoch
and the weights of the same run undisturbed, both written by that commit. Its arithmetic is exact
(dyadic_parts.py), so the bits do not depend on the CPU.
"""

import json
import shutil

import pytest
from safetensors.torch import load_file
from support.run_commands import ROOT

STORED = ROOT / "tests/golden/flat_layout_run"
DYADIC = [
    "model._target_=dyadic_parts.Masked", "~model.classes", "~model.input_shape",
    "data._target_=trainer.data.source.Datasets", "+data.train._target_=dyadic_parts.Points",
    "+data.eval._target_=dyadic_parts.Points", "task._target_=dyadic_parts.LinearLoss",
    "optimizer=sgd", "optimizer.lr=0.125", "optimizer.momentum=0.5",
    "scheduler._target_=torch.optim.lr_scheduler.StepLR", "+scheduler.step_size=4",
    "+scheduler.gamma=0.5", "sample.shape=[4]", "sample.classes=4", "trainer.max_epochs=4",
    "trainer.global_batch_size=8", "trainer.ema_decay=0.5", "checkpoint.every_steps=5",
    "checkpoint.every_epochs=null", "launch.threads=1", "tracker=silent", "run_dir=run",
    "name=dyadic", "launch.max_restarts=0",
]  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_of_a_flat_layout_run_is_bit_exact(command, ranks):
    stored = STORED / f"ranks-{ranks}"
    shutil.copytree(stored / "run", command.folder / "run")
    command.env["PYTHONPATH"] = str(STORED)
    resumed = command(*DYADIC, f"launch.nproc={ranks}")
    assert resumed.returncode == 0, resumed.stderr
    record = json.loads((command.folder / "run/attempts/0002.json").read_text())
    assert record["resumed_from"] == {"step": 5, "attempt": 1}
    for weights in ("model", "ema"):
        exported = command(
            "run", "format=safetensors", f"weights={weights}", f"out={weights}.safetensors",
            "allow=dyadic_parts", module="trainer.export",
        )  # fmt: skip
        assert exported.returncode == 0, exported.stderr
        tensors = load_file(command.folder / f"{weights}.safetensors")
        expected = load_file(stored / f"{weights}.safetensors")
        assert tensors.keys() == expected.keys()
        assert all(tensors[name].equal(expected[name]) for name in expected)


def test_finished_flat_layout_run_with_shipped_targets_is_read_by_every_command(command):
    shutil.copytree(STORED / "shipped/run", command.folder / "run")
    exported = command("run", "format=safetensors", "out=w.safetensors", module="trainer.export")
    assert exported.returncode == 0, exported.stderr
    expected = load_file(STORED / "shipped/model.safetensors")
    tensors = load_file(command.folder / "w.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].equal(expected[name]) for name in expected)
    for module, arguments in {
        "trainer.checkpoints": ["verify", "run"],
        "trainer.evaluate": ["run"],
        "trainer.report": ["run"],
        "trainer.top": [".", "--once"],
    }.items():
        completed = command(*arguments, module=module)
        assert completed.returncode == 0, completed.stderr
    longer = [
        "data=digits", "model=mlp", "model.hidden=[8]", "scheduler=warmup_cosine",
        "optimizer=adamw", "checkpoint.keep_last=1", "checkpoint.metric=accuracy",
        "checkpoint.every_steps=17", "tracker=silent", "name=shipped", "run_dir=run",
        "launch.threads=1", "trainer.max_steps=34",
    ]  # fmt: skip
    resumed = command(*longer)
    assert resumed.returncode == 0, resumed.stderr
    record = json.loads((command.folder / "run/attempts/0002.json").read_text())
    assert record["resumed_from"] == {"step": 30, "attempt": 1}
