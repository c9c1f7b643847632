"""Real processes: the command as a user starts it, and a package as a user would write one."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A small model with everything that makes resume hard: dropout, BatchNorm, shuffling, a schedule,
# clipping, evaluations and saves at steps of their own.
HARD = [
    "data=synthetic", "sample.shape=[1,8,8]", "data.train_samples=240", "data.eval_samples=70",
    "model.batch_norm=true", "model.channels=[4,8]", "model.hidden=16", "scheduler=cosine",
    "trainer.max_epochs=2", "trainer.global_batch_size=12", "trainer.log_every_steps=1",
    "trainer.clip_norm=1.0", "trainer.eval_every_steps=7", "checkpoint.every_steps=5",
    "launch.threads=1",
]  # fmt: skip

USER_PACKAGE = {
    "__init__.py": "",
    "task.py": '''
        """A Task that can be killed, fail or wait, at a given training step of a given rank."""
        import os
        import signal
        import time
        from pathlib import Path

        from trainer.task import Classification


        def signal_self(name):
            """Send this rank the signal that a test wants at this place."""
            os.kill(os.getpid(), getattr(signal, os.environ[name]))


        class Fragile(Classification):
            steps = batches = 0

            def __init__(self, *arguments, **more):
                super().__init__(*arguments, **more)
                if "SIGNAL_IN_BUILD" in os.environ:
                    signal_self("SIGNAL_IN_BUILD")

            def loss(self, model, batch):
                if not model.training:
                    self.batches += 1
                    if "SIGNAL_IN_EVALUATION" in os.environ and self.batches == 4:
                        signal_self("SIGNAL_IN_EVALUATION")
                if model.training:
                    self.steps += 1
                    time.sleep(float(os.environ.get("STEP_S", "0")))
                    here = f"{os.environ.get('RANK', '0')}:{self.steps}"
                    is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
                    if "SIGNAL_IN_STEP" in os.environ and self.steps == 9:
                        signal_self("SIGNAL_IN_STEP")
                    if os.environ.get("DIE_AT") == here and is_first:
                        while not list(Path().glob(os.environ.get("DIE_AFTER", "*"))):
                            time.sleep(0.02)
                        name = os.environ.get("DIE_BY", "SIGKILL")
                        os.kill(os.getpid(), getattr(signal, name))
                    if os.environ.get("TERM_AT") == here:
                        os.kill(os.getpid(), signal.SIGTERM)
                    if os.environ.get("PAUSE_AT") == here:
                        Path("paused").touch()
                        while Path("paused").exists():
                            time.sleep(0.02)
                    if os.environ.get("FAIL_AT") == here:
                        raise ZeroDivisionError("a bug in the user's own code")
                loss, logits = super().loss(model, batch)
                if model.training and os.environ.get("NO_GRADIENT_AT") == here:
                    loss = loss + (logits.sum() * 0).sqrt()  # 0, with a slope without end
                return loss, logits
    ''',
    "tracker.py": """
        import os

        from trainer.tracking.several import Silent

        from mine.task import signal_self


        class Signals(Silent):
            flushes = 0

            def flush(self):  # in the middle of a save
                self.flushes += 1
                if self.flushes == 2 and "SIGNAL_IN_SAVE" in os.environ:
                    signal_self("SIGNAL_IN_SAVE")


        class Broken(Silent):
            def __init__(self):
                raise RuntimeError("no connection to the server")
    """,
    "nets.py": """
        from torch import nn


        class Net(nn.Module):
            def __init__(self, width: int):
                super().__init__()
                self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.Linear(width, 3))

            def forward(self, x):
                return self.body(x)
    """,
    "data.py": '''
        import os
        import time
        from pathlib import Path

        import torch
        from torch.utils.data import Dataset


        class Points(Dataset):
            """A plain map-style Dataset: no tensors, no __getitems__."""

            def __init__(self, size: int = 60):
                self.size = size

            def __len__(self):
                return self.size

            def __getitem__(self, index):
                generator = torch.Generator().manual_seed(index)
                return torch.randn(4, 4, generator=generator) + index % 3, index % 3


        class Stuck(Points):
            """Waits for a file after a number of samples; its samples are partly random."""

            fetched = 0

            def __getitem__(self, index):
                self.fetched += 1
                if self.fetched == int(os.environ.get("STUCK_AFTER", "-1")):
                    Path("stuck").touch()
                    while Path("stuck").exists():
                        time.sleep(0.02)
                x, y = super().__getitem__(index)
                return x + 0.1 * torch.randn(4, 4), y
    ''',
}


def committed(run: Path) -> list[int]:
    """The steps that have a manifest, oldest first."""
    return sorted(int(path.parent.name[5:13]) for path in run.glob("checkpoints/*/manifest.json"))


class Command:
    """Starts `python -m trainer.…` in its own process, as a user does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {
            k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "OMP_"))
        }
        self.env["PERDURE_TEST"] = str(folder)
        self._started: list[subprocess.Popen] = []

    def start(self, *arguments: str, module: str = "trainer.run", **env: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=self.folder,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def __call__(
        self, *arguments: str, module: str = "trainer.run", **env: str
    ) -> subprocess.CompletedProcess:
        process = self.start(*arguments, module=module, **env)
        try:
            out, err = process.communicate(timeout=240)
        finally:
            if process.poll() is None:
                self.kill_all()
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def kill_all(self) -> None:
        """SIGKILL all processes started here and their children, by an environment variable.

        One that outlives its parent holds the pipe that a test reads to its end.
        """
        mark = f"PERDURE_TEST={self.folder}\0".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes() and process.name != str(os.getpid()):
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:  # it has ended
                pass
        for process in self._started:
            process.communicate(timeout=60)
        self._started.clear()


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    """The command, started in an empty folder, with the user's package `mine` on its path."""
    command_in_folder = in_folder(tmp_path)
    yield command_in_folder
    command_in_folder.kill_all()


def in_folder(parent: Path) -> Command:
    """Return the command in an empty folder under `parent`, with the package `mine`."""
    package = parent / "packages" / "mine"
    package.mkdir(parents=True)
    for name, text in USER_PACKAGE.items():
        (package / name).write_text(textwrap.dedent(text))
    folder = parent / "work"
    folder.mkdir()
    command_in_folder = Command(folder)
    paths = [str(package.parent), os.environ.get("PYTHONPATH", "")]
    command_in_folder.env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return command_in_folder


@pytest.fixture
def wait_for() -> Callable[[Callable[[], bool], subprocess.Popen], None]:
    """Wait until a condition holds while a process lives; a bound ends a test that never would."""

    def wait(condition: Callable[[], bool], process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            if process.poll() is not None:
                out, err = process.communicate()
                pytest.fail(f"the process ended with {process.returncode}:\n{out}\n{err}")
            if time.monotonic() > deadline:
                process.send_signal(signal.SIGKILL)
                pytest.fail("the condition never came true")
            time.sleep(0.02)

    return wait
