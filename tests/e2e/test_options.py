"""Options of a run, all at once: identical results after a kill."""

import pytest
from safetensors.torch import load_file
from support.run_commands import HARD

from scripts.compare_runs import differences

OPTIONS = [
    *HARD, "task._target_=mine.task.Fragile", "optimizer=adamw", "trainer.ema_decay=0.9",
    "trainer.on_nonfinite=skip", "optimizer.groups=[{names:['*.bias'],weight_decay:0}]",
    "trainer.accumulate=2",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_run_ends_with_identical_results(command, strategy):
    arguments = [*OPTIONS, "launch.nproc=2", f"parallel={strategy}", "parallel.min_parameters=50"]
    full = command(*arguments, "name=full")
    assert full.returncode == 0, full.stderr
    assert "weight_decay=0  *.bias" in full.stdout
    (command.folder / "a file").touch()  # Fragile waits for it before it dies
    assert command(*arguments, "name=broken", DIE_AT="1:17").returncode != 0
    done = command(*arguments, "name=broken")
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stdout
    runs = command.folder / "runs"
    assert differences(str(runs / "full"), str(runs / "broken")) == []
    for weights in ("model", "ema"):
        done = command(
            str(runs / "broken"), f"weights={weights}", f"out={weights}.safetensors",
            module="trainer.export",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    model, ema = (load_file(command.folder / f"{name}.safetensors") for name in ("model", "ema"))
    assert list(model) == list(ema)
    assert all(not name.startswith(("ema.", "_orig_mod.", "module.")) for name in ema)
    assert any(not model[name].equal(ema[name]) for name in model)
