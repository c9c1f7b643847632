"""Send stop signals to runs at random moments after their start; count the exit codes.

python scripts/signal_window.py [SIGNALS=200] [SECONDS=6] [override …]
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SMALL = [
    "data=synthetic", "sample.shape=[1,8,8]", "model=mlp", "trainer.max_epochs=100000",
    "trainer.global_batch_size=8", "launch.threads=1", "launch.device=cpu",
]  # fmt: skip
_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")


@dataclass(frozen=True)
class Trial:
    """Result of a run that received a signal."""

    after_s: float
    signal: str
    code: int
    """Exit code of the process; negative: it was killed by that signal."""
    outcome: str
    """Content of the outcome file."""
    output: str

    @property
    def is_right(self) -> bool:
        """True if exit code and outcome file have 75."""
        return (self.code, self.outcome) == (75, "75")


def trial(
    folder: Path, after_s: float, name: str, *overrides: str, since_handlers: bool = False
) -> Trial:
    """Start a run in `folder`, send it a signal after some seconds, and wait for its end.

    Args:
        folder: working directory.
        after_s: seconds since the start of the process.
        name: name of the signal.
        overrides: arguments of the run.
        since_handlers: count the seconds since the process has a handler for the signal.
    """
    outcome = folder / "outcome"
    outcome.unlink(missing_ok=True)
    run = subprocess.Popen(
        [sys.executable, "-m", "trainer.run", *SMALL, *overrides],
        cwd=folder,
        env={**os.environ, "PERDURE_OUTCOME": str(outcome)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while since_handlers and run.poll() is None and not _handles(run.pid, name):
            time.sleep(0.001)
        time.sleep(after_s)
        run.send_signal(getattr(signal, name))
        output, _ = run.communicate(timeout=120)
    finally:
        run.kill()
    code = outcome.read_text() if outcome.exists() else ""
    return Trial(after_s, name, run.returncode, code, output)


def _handles(pid: int, name: str) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (getattr(signal, name) - 1) & 1)


def main() -> None:
    """Print how many runs ended with 75, and the moments and codes of the others."""
    numbers = [word for word in sys.argv[1:] if word.replace(".", "").isdigit()]
    overrides = [word for word in sys.argv[1:] if word not in numbers]
    count, seconds = map(
        float, [*numbers, "200", "6"][:2] if len(numbers) != 1 else [*numbers, "6"]
    )
    choose = random.Random(int(count))
    trials = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(int(count)):
            after_s, name = choose.uniform(0, seconds), choose.choice(_SIGNALS)
            done = trial(Path(folder), after_s, name, f"name=r{number}", *overrides)
            trials.append(done)
            if not done.is_right:
                print(f"{after_s:.3f} s {name}: exit {done.code}, outcome {done.outcome!r}")
                print(done.output[-500:], flush=True)
    print(Counter((done.code, done.outcome) for done in trials))


if __name__ == "__main__":
    main()
