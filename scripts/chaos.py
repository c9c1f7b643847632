"""SIGKILL at random instants of a real training that saves every few steps, and a tally.

python scripts/chaos.py [--kills 500] [--ranks 1,2] [--seed 0] [--folder DIR]

A run is started, killed, judged and started again until the kills are used up; then it is left
alone and has to end as a run that was never killed. What it proves, or exits with 1 at the first
failure and leaves the folder:

- Whatever the instant, the newest checkpoint is there, every byte of it and of the older ones is
  right, and none that was ever seen committed is lost. There is none only before the first commit.
- The next attempt goes on from exactly that checkpoint.
- A rank whose peer was killed reports no success.
- The end is identical, bit for bit: weights, optimizer, scheduler, generators, metrics.jsonl.
- A finished run keeps no shards but those of its checkpoints.

Half of the kills of several ranks take one rank first, so that the others see it die. The instants
are drawn from --seed; what a kill meets at its instant is up to the machine, and the tally says
what it was.

One process imports everything once and forks the ranks of every attempt, so that they start in
tenths of a second. It never computes and never has a second thread: what a fork copies of a pool
of threads is a pool without them, and whoever waits for one waits forever.
"""

import argparse
import gc
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]

EPOCHS, STEPS_PER_EPOCH = 12, 20
LAST_STEP = EPOCHS * STEPS_PER_EPOCH
KEEP_LAST = 2

# Everything that makes resume hard, as in tests/e2e/commands.py, with a model wide enough that a
# save of 5 MB is in flight most of the time.
SETTINGS = [
    "data=synthetic", "sample.shape=[1,8,8]", "data.train_samples=240", "data.eval_samples=70",
    "model.batch_norm=true", "model.channels=[4,8]", "model.hidden=10000", "scheduler=cosine",
    f"trainer.max_epochs={EPOCHS}", "trainer.global_batch_size=12", "trainer.log_every_steps=1",
    "trainer.clip_norm=1.0", "trainer.eval_every_steps=7", "checkpoint.every_steps=3",
    f"checkpoint.keep_last={KEEP_LAST}", "launch.threads=1", "launch.device=cpu",
]  # fmt: skip

START_UP = "start-up"
TRAINING = "training, nothing in flight"
WRITING = "a save: shards"
PUBLISHING = "a save: manifest"
PRUNING = "just after a commit: pruning"
FOUND = (START_UP, TRAINING, WRITING, PUBLISHING, PRUNING)
"""What a kill can leave behind, as its row in the tally is called."""

_POLL_S = 0.0005
_PATIENCE_S = 180.0
"""How long an attempt may take to show what is waited for, on a machine that has other work."""
_TEMPORARY = ".tmp-"


class Broken(Exception):
    """A promise does not hold."""


# --- processes ---------------------------------------------------------------------------------

_children: set[int] = set()
"""Everything that is alive, so that nothing outlives this process."""


def preload() -> None:
    """Import all that a rank will need, and make sure that no thread came with it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "PERDURE_OUTCOME"):
        os.environ.pop(name, None)
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    sys.path[0] = str(ROOT)  # this checkout, and not another one that may be installed

    import torch._dynamo  # optimizers import it when they are made
    import torch.distributed.checkpoint.default_planner
    import torch.distributed.tensor
    import torchmetrics
    from hydra.core.plugins import Plugins

    import models.cnn
    import scripts.compare_runs
    import trainer.data.synthetic
    import trainer.run
    import trainer.schedule
    import trainer.tracking.console  # noqa: F401 (all of these are for the children)

    Plugins.instance()  # scans packages, once
    gc.freeze()  # a collection in a child would copy every page that it looks at


def fork(body: Callable[[], int], log: Path) -> int:
    """Run `body` in a child that dies with this process; return its process id."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"{threads} threads here: a fork of this process could hang")
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        _children.add(pid)
        return pid
    _be_child(body, log)


def _be_child(body: Callable[[], int], log: Path) -> NoReturn:
    from trainer import launch

    code = 1
    try:
        launch.die_with_launcher()
        os.setsid()  # Ctrl-C is for the parent
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = body()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ask(question: Callable[[], Any], log: Path) -> Any:
    """Return the answer of a child that may use threads and torch; it travels as JSON."""
    reading, writing = os.pipe()

    def answer() -> int:
        os.close(reading)
        try:
            found = {"answer": question()}
        except Exception as error:
            found = {"error": "".join(traceback.format_exception(error))}
        with open(writing, "w") as pipe:
            json.dump(found, pipe)
        return 0

    pid = fork(answer, log)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    _children.discard(pid)
    found = json.loads(text or '{"error": "the child that looked at it died"}')
    if "error" in found:
        raise Broken(found["error"])
    return found["answer"]


def kill_children() -> None:
    """End whatever is alive."""
    for pid in tuple(_children):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        _children.discard(pid)


class Ranks:
    """The processes of one attempt. `codes` has the exit codes of those that left by themselves."""

    def __init__(self, run_dir: Path, count: int, log: Path) -> None:
        self.codes: dict[int, int] = {}
        port = _free_port()
        self._pids = {
            rank: fork(lambda rank=rank: _train(run_dir, rank, count, port), log)
            for rank in range(count)
        }

    def alive(self) -> list[int]:
        """Return the ranks that have not left."""
        for rank, pid in tuple(self._pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._take(rank, status)
        return list(self._pids)

    def kill(self, ranks: Sequence[int]) -> None:
        """SIGKILL some of them at once, then wait until the kernel is done with them."""
        for rank in ranks:
            os.kill(self._pids[rank], signal.SIGKILL)
        for rank in ranks:
            self._take(rank, os.waitpid(self._pids[rank], 0)[1])

    def _take(self, rank: int, status: int) -> None:
        _children.discard(self._pids.pop(rank))
        code = os.waitstatus_to_exitcode(status)
        if code != -signal.SIGKILL:
            self.codes[rank] = code

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Wait until something holds; return False if a rank left before it did."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while not condition():
            self.alive()
            if self.codes:
                return False
            if time.monotonic() > deadline_s:
                raise Broken(f"an attempt showed nothing new for {_PATIENCE_S:.0f} s")
            time.sleep(_POLL_S)
        return True

    def let_end(self) -> None:
        """Wait until all of them have left, each with success."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while self.alive():
            if any(self.codes.values()) or time.monotonic() > deadline_s:
                break
            time.sleep(0.01)
        if self._pids or any(self.codes.values()):
            raise Broken(f"nobody killed it, and its exit codes are {self.codes or 'none'}")


def _train(run_dir: Path, rank: int, count: int, port: int) -> int:
    """Be a rank: the same command as a user's, its environment as torchrun sets it."""
    from trainer import run

    if count > 1:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(count),
            "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    return run.main([*SETTINGS, f"name={run_dir.name}", f"run_dir={run_dir}"])


def _free_port() -> int:
    """Return a port that is free, from below those which the kernel gives to connections."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


# --- what can be seen from outside -------------------------------------------------------------


class Watch:
    """What an attempt has done so far, from its files."""

    def __init__(self, run_dir: Path) -> None:
        self._attempts, self._checkpoints = run_dir / "attempts", run_dir / "checkpoints"
        self.earlier_attempts = len(self._records())
        self._earlier_folders = set(_names(self._checkpoints))

    def _records(self) -> list[str]:
        return [name for name in _names(self._attempts) if not name.startswith(_TEMPORARY)]

    def has_begun(self) -> bool:
        """Return whether the attempt has a record: it owns the run, and starts to load."""
        return len(self._records()) > self.earlier_attempts

    def is_training(self) -> bool:
        """Return whether it has said what it resumed from: it trains, or will in a moment."""
        if not self.has_begun():
            return False
        record = json.loads((self._attempts / max(self._records())).read_text())
        return "resumed_from" in record

    def is_saving(self) -> bool:
        """Return whether a checkpoint of this attempt is being written, or deleted."""
        return any(not committed for _, committed in self._folders())

    def committed_step(self) -> int:
        """Return the newest step that this attempt has committed, or 0."""
        return max((step for step, committed in self._folders() if committed), default=0)

    def _folders(self) -> list[tuple[int, bool]]:
        from trainer.checkpoint.lineage import MANIFEST
        from trainer.checkpoint.manifest import parse_folder

        own = set(_names(self._checkpoints)) - self._earlier_folders
        parsed = [(parse_folder(name), self._checkpoints / name / MANIFEST) for name in own]
        return [(found[0], manifest.exists()) for found, manifest in parsed if found]


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


@dataclass(frozen=True)
class Verdict:
    """What was found after a kill, when everything in the run was checked."""

    newest_step: int
    """Of the newest checkpoint; 0: there is none."""
    resumed_step: int | None
    """Where the killed attempt said that it went on from, if it had come that far."""
    found: str
    """One of FOUND."""
    left_files: int
    """Files that belong to no checkpoint, for the next attempt to clean up."""


def judge(run_dir: Path, earlier_attempts: int) -> dict[str, Any]:
    """Read every byte of every checkpoint; return a Verdict's fields. In a child, by `ask`."""
    from trainer import checkpoint
    from trainer.checkpoint import lineage
    from trainer.storage import LocalStore

    store = LocalStore(run_dir)
    newest, commits = checkpoint.latest(store), checkpoint.steps(store)
    for commit in commits:
        checkpoint.verify(store, lineage.read_manifest(store, commit))
    records = lineage.records(store)
    own = records[-1] if len(records) > earlier_attempts else {}
    start = own.get("resumed_from")
    return {
        "newest_step": newest.step if newest else 0,
        "resumed_step": start["step"] if start else None,
        "found": _state(run_dir, own["attempt"], commits) if start else START_UP,
        "left_files": len(leftovers(run_dir)),
    }


def _state(run_dir: Path, attempt: int, commits: Sequence[Any]) -> str:
    """Return what an attempt was doing that had begun to train."""
    from trainer.checkpoint.lineage import MANIFEST
    from trainer.checkpoint.manifest import parse_folder

    newest_step = commits[-1].step if commits else 0
    folders = _names(run_dir / "checkpoints")
    pruning = False
    for name in folders:
        parsed, files = parse_folder(name), _names(run_dir / "checkpoints" / name)
        if parsed is None or parsed[1] != attempt:
            continue
        has_temporary = any(file.startswith(_TEMPORARY) for file in files)
        if MANIFEST not in files and parsed[0] > newest_step:
            return PUBLISHING if has_temporary else WRITING
        pruning = pruning or MANIFEST not in files or has_temporary
    has_committed = any(commit.attempt == attempt for commit in commits)
    return PRUNING if pruning or (has_committed and len(folders) > KEEP_LAST) else TRAINING


def leftovers(run_dir: Path) -> list[str]:
    """Return the files that belong neither to the run nor to one of its checkpoints."""
    from trainer.checkpoint import lineage
    from trainer.storage import LocalStore

    store = LocalStore(run_dir)
    known = {"config.yaml", "metrics.jsonl"}
    for commit in lineage.commits(store):
        files = lineage.read_manifest(store, commit).files
        known |= {commit.manifest_key, *(f"{commit.folder}/{file}" for file in files)}
    found = (path for path in run_dir.rglob("*") if path.is_file())
    keys = {path.relative_to(run_dir).as_posix() for path in found}
    return sorted(
        key for key in keys - known if not key.startswith("attempts/") or _TEMPORARY in key
    )


# --- kills -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shot:
    """When and how to kill an attempt."""

    aim: str
    """START_UP, TRAINING or WRITING: what to wait for."""
    lead_s: float
    """How long to let it train before waiting for a save."""
    delay_s: float
    """How long to wait then."""
    first: int | None
    """The rank that dies first; None: all at once."""
    ahead_s: float
    """How long the others live on."""


def draw(dice: random.Random, ranks: int) -> Shot:
    """Draw a kill; most of them fall into training and saving."""
    aim = dice.choices((START_UP, TRAINING, WRITING), weights=(10, 45, 45))[0]
    longest_s = {START_UP: 0.15, TRAINING: 0.4, WRITING: 0.05}[aim]
    one_first = ranks > 1 and dice.random() < 0.5
    return Shot(
        aim,
        lead_s=dice.uniform(0.0, 0.25),
        delay_s=dice.uniform(0.0, longest_s),
        first=dice.randrange(ranks) if one_first else None,
        ahead_s=dice.uniform(0.0, 0.3),
    )


@dataclass
class Tally:
    """What the kills of one number of ranks met."""

    kills: int = 0
    found: Counter[str] = field(default_factory=Counter)
    one_first: int = 0
    left: int = 0
    """Ranks that saw their peer die and left by themselves."""
    most_left_files: int = 0
    runs: int = 0
    stray_files: int = 0
    """Files without a use in the finished runs."""


class Trial:
    """One run, killed again and again, and what it has promised so far."""

    def __init__(self, run_dir: Path, ranks: int, tally: Tally) -> None:
        self.run_dir, self.ranks, self.tally = run_dir, ranks, tally
        self.log = run_dir.with_suffix(".log")
        self.newest_step = 0
        """Of the newest checkpoint after the last kill."""
        self._seen_step = 0
        """The newest that was ever seen committed, also between kills."""

    def strike(self, shot: Shot) -> bool:
        """Start an attempt and kill it; return False if the run came to its end before."""
        watch = Watch(self.run_dir)
        ranks = Ranks(self.run_dir, self.ranks, self.log)
        if not self._aim(shot, watch, ranks):
            ranks.let_end()
            return False
        if shot.first is not None and shot.first in ranks.alive():
            ranks.kill([shot.first])
            self.tally.one_first += 1
            until_s = time.monotonic() + shot.ahead_s
            while time.monotonic() < until_s and ranks.alive():
                self._seen_step = max(self._seen_step, watch.committed_step())
                time.sleep(_POLL_S)
        self._seen_step = max(self._seen_step, watch.committed_step())
        ranks.kill(ranks.alive())
        found = ask(lambda: judge(self.run_dir, watch.earlier_attempts), self.log)
        self._hear(Verdict(**found), ranks.codes)
        return True

    def _aim(self, shot: Shot, watch: Watch, ranks: Ranks) -> bool:
        """Wait for the instant; return False if a rank left by itself before."""
        goal = watch.has_begun if shot.aim == START_UP else watch.is_training
        if not ranks.wait(goal):
            return False
        if shot.aim == WRITING:
            self._let_train(shot.lead_s, watch, ranks)
            if not ranks.wait(watch.is_saving):
                return False
        self._let_train(shot.delay_s, watch, ranks)
        return not ranks.codes

    def _let_train(self, seconds: float, watch: Watch, ranks: Ranks) -> None:
        until_s = time.monotonic() + seconds
        ranks.wait(lambda: time.monotonic() >= until_s)
        self._seen_step = max(self._seen_step, watch.committed_step())

    def _hear(self, verdict: Verdict, codes: Mapping[int, int]) -> None:
        """Hold what was found against what was promised, and count it."""
        if verdict.resumed_step not in (None, self.newest_step):
            raise Broken(
                f"the newest checkpoint was of step {self.newest_step}, and the next attempt went "
                f"on from step {verdict.resumed_step}"
            )
        if verdict.newest_step < self._seen_step:
            raise Broken(
                f"step {self._seen_step} was committed, and after a kill (during "
                f"{verdict.found}) the newest checkpoint is of step {verdict.newest_step}"
            )
        for rank, code in codes.items():
            allowed = (0, 1) if verdict.newest_step == LAST_STEP else (1,)
            if code not in allowed:
                raise Broken(f"rank {rank} left with exit code {code} after its peer was killed")
        self.newest_step = self._seen_step = verdict.newest_step
        self.tally.kills += 1
        self.tally.left += len(codes)
        self.tally.found[verdict.found] += 1
        self.tally.most_left_files = max(self.tally.most_left_files, verdict.left_files)

    def end(self, undisturbed: Path) -> None:
        """Let the run end, and compare it with one that was never killed."""
        Ranks(self.run_dir, self.ranks, self.log).let_end()
        found, stray = ask(lambda: _compare(undisturbed, self.run_dir), self.log)
        if found:
            raise Broken("it ended differently from an undisturbed run:\n" + "\n".join(found[:20]))
        self.tally.runs += 1
        self.tally.stray_files += len(stray)
        print(stray)


def _compare(undisturbed: Path, run_dir: Path) -> tuple[list[str], list[str]]:
    from scripts.compare_runs import differences

    found = differences(str(undisturbed), str(run_dir))
    return [line[:500] for line in found], leftovers(run_dir)


def torture(folder: Path, ranks: int, kills: int, dice: random.Random) -> Tally:
    """Kill runs of so many ranks, one run after the other."""
    tally = Tally()
    undisturbed = folder / f"ranks-{ranks}-undisturbed"
    Trial(undisturbed, ranks, tally)
    Ranks(undisturbed, ranks, undisturbed.with_suffix(".log")).let_end()
    number = 0
    while tally.kills < kills:
        number += 1
        trial = Trial(folder / f"ranks-{ranks}-run-{number}", ranks, tally)
        while tally.kills < kills and trial.strike(draw(dice, ranks)):
            if tally.kills % 10 == 0:
                print(tally.kills, trial.newest_step, tally.found, flush=True)
        trial.end(undisturbed)
    return tally


if __name__ == "__main__":
    preload()
    f = Path(tempfile.mkdtemp(prefix="perdure-chaos-"))
    print(f)
    for r in (1, 2):
        t0 = time.time()
        try:
            print(torture(f, r, 40, random.Random(0)), time.time() - t0)
        finally:
            kill_children()
