"""Data workers are killed in the middle of an epoch; the resumed run ends identically."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.run_commands import HARD, committed

from scripts.compare_runs import differences

PICTURES = [
    *(option for option in HARD if not option.startswith(("data", "sample", "trainer.max_epochs"))),
    "data=image_folder", "data.dir=pictures", "sample.shape=[3,8,8]", "sample.classes=3",
    "data.augment=resized_crop", "data.flip=true", "trainer.max_epochs=12",
    "trainer.data_workers=2", "trainer.on_damaged=skip",
]  # fmt: skip


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_run_with_killed_workers_ends_with_identical_results(command, wait_for, ranks):
    settings = [*PICTURES, f"launch.nproc={ranks}"]
    for n in range(90):
        pixels = np.random.default_rng(n).integers(0, 256, (20, 24, 3)).astype(np.uint8)
        path = command.folder / "pictures" / "abc"[n % 3] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (command.folder / "pictures/b/40.png").write_bytes(b"no picture")
    undisturbed = command(*settings, "name=a")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert "SKIPPED sample" in undisturbed.stdout
    run = command.folder / "runs/b"
    disturbed = command.start(*settings, "name=b")
    wait_for(lambda: any(step >= 10 for step in committed(run)), disturbed)
    rank = disturbed.pid if ranks == 1 else max(children(disturbed.pid))
    for worker in children(rank):
        os.kill(worker, signal.SIGKILL)
    _, err = disturbed.communicate(timeout=120)
    assert disturbed.returncode == 75
    assert "DataLoader worker (pid" in err
    assert "lower trainer.data_workers" in err
    logs = "".join(path.read_text() for path in (run / "logs").rglob("*stderr*"))
    assert "Traceback" not in err + logs
    assert max(committed(run)) < max(committed(command.folder / "runs/a"))
    again = command(*settings, "name=b")
    assert again.returncode == 0, again.stderr
    assert "resuming from step" in again.stdout
    assert differences(str(command.folder / "runs/a"), str(run)) == []
