"""parallel=fsdp: identical results after a kill; checkpoints resume under any strategy."""

import re

import pytest
from support.run_commands import HARD, ROOT, committed

from scripts.compare_runs import differences
from trainer.checkpoint import compare
from trainer.checkpoint.location import open_location
from trainer.checkpoint.select import pick
from trainer.export.loaded_checkpoint import open_checkpoint

FSDP = [*HARD, "task._target_=mine.task.Fragile", "parallel=fsdp", "parallel.min_parameters=50",
        "trainer.accumulate=2", "trainer.clip_norm=0.5"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_killed_run_ends_with_identical_results(command, ranks):
    arguments = [*FSDP, f"launch.nproc={ranks}"]
    assert command(*arguments, "name=full").returncode == 0
    (command.folder / "a file").touch()  # Fragile waits for it before it dies
    killed = command(*arguments, "name=broken", DIE_AT=f"{ranks - 1}:17")
    assert killed.returncode != 0
    done = command(*arguments, "name=broken")
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stdout
    runs = command.folder / "runs"
    assert differences(str(runs / "full"), str(runs / "broken")) == []
    names = {"__name__": "read_checkpoint"}  # the reader from the documentation
    reader = ROOT / "docs/examples/read_checkpoint.py"
    exec(compile(reader.read_text(), reader.name, "exec"), names)
    _, tensors = names["read"](names["newest"](runs / "broken"))
    weights = open_checkpoint(str(runs / "broken"), "latest").weights()
    for name, weight in weights.items():
        assert (tensors[f"model.{name}"] == weight.numpy()).all(), name


PLAIN = [
    "data=synthetic", "sample.shape=[1,8,8]", "data.train_samples=240", "data.eval_samples=2",
    "model=mlp", "optimizer=sgd", "trainer.max_epochs=2", "launch.threads=1",
    "trainer.global_batch_size=12", "trainer.clip_norm=1.0", "parallel.min_parameters=50",
]  # fmt: skip


@pytest.mark.slow
def test_checkpoint_resumes_under_ddp_and_single_and_back(command):
    """The samples come in the same order, so all end where one process ends, but for rounding.

    Two samples to evaluate on: one of three ranks has none, and takes part in the forward.
    """
    assert command(*PLAIN, "name=alone").returncode == 0
    for strategy, ranks, until in (
        ("fsdp", 3, 10),
        ("ddp", 2, 20),
        ("fsdp", 2, 30),
        ("ddp", 1, 40),
    ):
        done = command(
            *PLAIN, "name=moved", f"parallel={strategy}", f"launch.nproc={ranks}",
            f"trainer.max_steps={until}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    sides = []
    for name in ("alone", "moved"):
        location = open_location(str(command.folder / "runs" / name))
        commit = pick(location, "40")
        sides.append((location.manifest(commit), location.reader(commit)))
    result = compare.compare(*sides)
    assert (result.only_first, result.only_second, result.recast) == ([], [], [])
    far = {change.name: change.relative for change in result.changed if change.relative > 1e-4}
    assert [name for name in far if not name.startswith("rng.")] == []


def test_unknown_block_class_is_reported_before_any_save(command):
    done = command(*FSDP, "name=a", "parallel.blocks=[Linaer]", "launch.nproc=2")
    assert done.returncode == 2
    assert re.search(
        r"parallel.blocks: the model has no module of class Linaer \(did you", done.stderr
    )
    assert "Traceback" not in done.stderr
    assert committed(command.folder / "runs/a") == []
