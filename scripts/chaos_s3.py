"""SIGKILL at random instants of trainings in a bucket, and of the server itself; and a tally.

python -m scripts.chaos_s3 [--kills 100] [--ranks 1,2] [--seed 0]

A run is started and left to train for a moment; then all its processes are killed, or one rank, or
the server, which comes back a little later while the run goes on. The run is started again until
it ends, and the next one begins, until the kills are used up. What must hold, or it exits with 1:

- Every byte of every checkpoint is right, and none that was ever seen committed is lost.
- A dead server ends nothing but its own requests: the run survives it.
- The end is that of a run which nothing happened to, bit for bit: weights, optimizer, scheduler,
  generators, metrics.
- A finished run leaves no object and no upload that belongs to no checkpoint that counts.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.chaos_ranks import SETTINGS, Broken
from scripts.compare_runs import differences
from scripts.s3_server import BUCKET, S3Server
from trainer import checkpoint
from trainer.checkpoint import lineage
from trainer.storage import Store, open_store

_PATIENCE_S = 240.0
_LONGEST_S = 4.0
"""Maximum time between the start of training and the kill, in seconds."""
_LONGEST_OUTAGE_S = 3.0
_TARGETS = ("the run", "a rank", "the server")


class Run:
    """A run in the bucket, and its processes of the moment."""

    def __init__(self, name: str, ranks: int, log: Path) -> None:
        self.url, self.ranks, self._log = f"s3://{BUCKET}/{name}", ranks, log
        self.store: Store = open_store(self.url)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the command in its own process group."""
        command = [sys.executable, "-m", "trainer.run", *SETTINGS, f"run_dir={self.url}"]
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [*command, f"launch.nproc={self.ranks}"],
                stdout=log, stderr=log, start_new_session=True, cwd=self._log.parent,
            )  # fmt: skip

    def code(self) -> int | None:
        """Return the exit code, if the command has ended."""
        assert self._process is not None
        return self._process.poll()

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Wait until a condition holds; return False if the command ends before."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while not condition():
            if self.code() is not None:
                return False
            if time.monotonic() > deadline_s:
                raise Broken(f"{self.url} did not get on for {_PATIENCE_S:.0f} s")
            time.sleep(0.05)
        return True

    def is_training(self, attempt: int) -> bool:
        """Return whether an attempt of this number or a later one has started to train."""
        records = lineage.records(self.store)
        return bool(records) and records[-1]["attempt"] >= attempt and "resumed_from" in records[-1]

    def kill(self) -> None:
        """SIGKILL all processes at once."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def kill_rank(self) -> None:
        """SIGKILL the newest process: a rank, or the command itself; the others have to end."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        os.kill(
            max(map(int, children.read_text().split()), default=self._process.pid), signal.SIGKILL
        )
        if self._process.wait(_PATIENCE_S) == 0:
            raise Broken(f"{self.url}: a rank was killed, and the command reports success")

    def newest(self) -> int:
        """Verify every checkpoint; return the newest step, 0 if there is none."""
        commits = checkpoint.steps(self.store)
        for commit in commits:
            checkpoint.verify(self.store, lineage.read_manifest(self.store, commit))
        return commits[-1].step if commits else 0

    def useless(self) -> list[str]:
        """Return the objects and uploads that belong to nothing."""
        useful = {"config.yaml", "metrics.jsonl", "saves.jsonl"}
        useful |= {*self.store.list("attempts"), *self.store.list("samples")}
        for commit in lineage.commits(self.store):
            shards = lineage.read_manifest(self.store, commit).files
            useful |= {commit.manifest_key, *(f"{commit.folder}/{name}" for name in shards)}
        return sorted({*self.store.list("", unfinished=True)} - useful)


def torment(
    run: Run, server: S3Server, kills: int, dice: random.Random, tally: Counter[str]
) -> None:
    """Bring a run to its end through at most so many kills."""
    seen, attempt = 0, 1
    while True:
        run.start()
        if run.wait(lambda attempt=attempt: run.is_training(attempt)) and kills > 0:
            kills -= 1
            target = dice.choice(_TARGETS)
            time.sleep(dice.uniform(0.0, _LONGEST_S))
            if run.code() is not None:
                pass  # it was faster
            elif target == "the server":
                tally[target] += 1
                server.kill()
                time.sleep(dice.uniform(0.0, _LONGEST_OUTAGE_S))
                server.start()
                run.wait(lambda: False)
            else:
                tally[target] += 1
                run.kill() if target == "the run" else run.kill_rank()
        run.wait(lambda: False)
        code = run.code()
        newest = run.newest()
        if newest < seen:
            raise Broken(f"{run.url}: step {seen} was committed, and the newest is {newest}")
        if code == 0:
            return
        if code not in (-signal.SIGKILL, 75):
            raise Broken(f"{run.url} ended with the exit code {code}")
        seen, attempt = newest, len(lineage.records(run.store)) + 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill as often as asked; print the tally."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    dice, tally = random.Random(options.seed), Counter[str]()
    counts = [int(count) for count in options.ranks.split(",")]
    with tempfile.TemporaryDirectory(prefix="perdure-chaos-") as folder:
        log = Path(folder, "log.txt")
        server = S3Server(Path(folder))
        server.start()
        os.environ |= {**server.environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
        try:
            undisturbed = {count: Run(f"whole-{count}", count, log) for count in counts}
            for run in undisturbed.values():
                torment(run, server, 0, dice, Counter())
            done = 0
            while (used := tally.total()) < options.kills:
                count = counts[done % len(counts)]
                run = Run(f"run-{done}", count, log)
                torment(run, server, options.kills - used, dice, tally)
                texts = [*differences(undisturbed[count].url, run.url), *run.useless()]
                if texts:
                    raise Broken(f"{run.url} is not as a run that nothing happened to: {texts[:9]}")
                done += 1
        except Broken as error:
            print(log.read_text()[-4000:], file=sys.stderr)
            print(f"BROKEN: {error}", file=sys.stderr)
            return 1
        finally:
            server.kill()
    for target in _TARGETS:
        print(f"kills of {target:<12} {tally[target]:5}")
    print(f"kills in all          {tally.total():5}")
    print(f"runs that ended bit-identical {done}")
    print("Every promise held.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
