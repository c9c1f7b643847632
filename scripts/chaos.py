"""SIGKILL at random instants of a real training that saves every few steps, and a tally.

python scripts/chaos.py [--kills 500] [--ranks 1,2] [--seed 0] [--folder DIR]

A run is started, killed, examined and started again until the kills are used up; then it is left
alone. What must hold; at the first failure the exit code is 1 and the folder stays:

- Every byte of every checkpoint is right at any moment, and no committed checkpoint is lost.
  A run has a checkpoint from its first commit on.
- The next attempt resumes from exactly the newest one.
- A rank whose peer was killed reports no success.
- The end is that of a run which was never killed, bit for bit: weights, optimizer, scheduler,
  generators, metrics.jsonl.
- A finished run keeps no shards but those of its checkpoints.

Of the kills of several ranks, half take one rank first, so that the others see it die. The aims
are drawn from --seed; the tally counts what each kill actually interrupted.

One process imports everything once and forks the ranks of every attempt, so that they start in
tenths of a second. It never computes and never has a second thread: a fork copies a pool of
threads without its threads, and a wait for one of them never ends.
"""

import argparse
import gc
import importlib
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

EPOCHS, STEPS_PER_EPOCH, GLOBAL_BATCH_SIZE = 8, 20, 12
LAST_STEP = EPOCHS * STEPS_PER_EPOCH
KEEP_LAST = 2

# The settings of tests/support/run_commands.py, with a model so wide that a save writes
# 5 MB and takes as long as some steps.
SETTINGS = [
    "data=synthetic", "sample.shape=[1,8,8]", "data.eval_samples=70",
    f"data.train_samples={STEPS_PER_EPOCH * GLOBAL_BATCH_SIZE}",
    "model.batch_norm=true", "model.channels=[4,8]", "model.hidden=10000", "scheduler=cosine",
    f"trainer.max_epochs={EPOCHS}", f"trainer.global_batch_size={GLOBAL_BATCH_SIZE}",
    "trainer.log_every_steps=1", "trainer.clip_norm=1.0", "trainer.eval_every_steps=7",
    "checkpoint.every_steps=3", f"checkpoint.keep_last={KEEP_LAST}",
    "launch.threads=1", "launch.device=cpu",
    "launch.max_attempts_without_progress=0",  # kills may come faster than saves
]  # fmt: skip

START_UP = "start-up"
TRAINING = "training alone"
WRITING = "a save: shards"
PUBLISHING = "a save: manifest"
PRUNING = "after a commit: pruning"
STATES = (START_UP, TRAINING, WRITING, PUBLISHING, PRUNING)
"""Activities of a killed attempt, as counted in the tally."""

_POLL_S = 0.0005
_PATIENCE_S = 180.0
"""Timeout of every wait, in seconds; the machine may have other work."""


class Broken(Exception):
    """A promise does not hold."""


# --- processes ---------------------------------------------------------------------------------

_children: set[int] = set()
"""Process ids of all that is alive, so that nothing outlives this process."""

_IMPORTS = (
    "torch.distributed.checkpoint.default_planner", "torch.distributed.tensor",
    "torch._dynamo",  # every optimizer imports it
    "torchmetrics", "hydra", "omegaconf", "trainer.run", "trainer.training.attempt",
    "trainer.schedule", "trainer.task", "trainer.data.synthetic", "trainer.tracking.console",
    "models.cnn", "scripts.compare_runs",
)  # fmt: skip


def preload() -> None:
    """Import all that a rank needs, from this checkout."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "PERDURE_OUTCOME"):
        os.environ.pop(name, None)
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    sys.path[0] = str(ROOT)
    for name in _IMPORTS:
        importlib.import_module(name)
    from hydra.core.plugins import Plugins

    Plugins.instance()  # looks through packages, once
    gc.freeze()  # or the collector of a child would copy every page


def fork(body: Callable[[], int], log: Path) -> int:
    """Run `body` in a child that dies with this process; return its process id."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"there are {threads} threads here; a fork could hang")
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _be_child(body, log)
    _children.add(pid)
    return pid


def _be_child(body: Callable[[], int], log: Path) -> NoReturn:
    code: Any = 1
    try:
        from trainer.core import threads

        threads.die_with_parent()
        os.setsid()  # a Ctrl-C is meant for the parent
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = body()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def ask(question: Callable[[], Any], log: Path) -> Any:
    """Return the answer of a child, which may compute; it travels as JSON."""
    reading, writing = os.pipe()

    def answer() -> int:
        os.close(reading)
        try:
            finding = {"answer": question()}
        except Exception as error:
            finding = {"error": "".join(traceback.format_exception(error)).rstrip()}
        with open(writing, "w") as pipe:
            json.dump(finding, pipe)
        return 0

    pid = fork(answer, log)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    _children.discard(pid)
    finding = json.loads(text or '{"error": "the process that examined the run was killed"}')
    if "error" in finding:
        raise Broken(finding["error"])
    return finding["answer"]


def kill_children() -> None:
    """Kill all children."""
    for pid in tuple(_children):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        _children.discard(pid)


class Ranks:
    """The processes of one attempt."""

    def __init__(self, run_dir: Path, count: int, log: Path) -> None:
        self.codes: dict[int, int] = {}
        """Exit codes of the ranks that exited early."""
        port = _free_port()
        self._pids = {
            rank: fork(lambda rank=rank: _train(run_dir, rank, count, port), log)
            for rank in range(count)
        }

    def alive(self) -> list[int]:
        """Return the ranks that are alive."""
        for rank, pid in tuple(self._pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._bury(rank, status)
        return list(self._pids)

    def kill(self, ranks: Sequence[int]) -> None:
        """SIGKILL ranks at the same time, and wait until the kernel is done with them."""
        for rank in ranks:
            os.kill(self._pids[rank], signal.SIGKILL)
        for rank in ranks:
            self._bury(rank, os.waitpid(self._pids[rank], 0)[1])

    def _bury(self, rank: int, status: int) -> None:
        _children.discard(self._pids.pop(rank))
        code = os.waitstatus_to_exitcode(status)
        if code != -signal.SIGKILL:
            self.codes[rank] = code

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Wait until a condition holds; return False if a rank exited early before."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while not condition():
            self.alive()
            if self.codes:
                return False
            if time.monotonic() > deadline_s:
                raise Broken(f"an attempt did not get on for {_PATIENCE_S:.0f} s")
            time.sleep(_POLL_S)
        return True

    def let_end(self) -> None:
        """Wait until all ranks have left, and all with success."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while self.alive() and not any(self.codes.values()):
            if time.monotonic() > deadline_s:
                raise Broken(f"an attempt did not end within {_PATIENCE_S:.0f} s")
            time.sleep(0.01)
        if any(self.codes.values()):
            raise Broken(f"no rank was killed; the exit codes are {self.codes}")


def _train(run_dir: Path, rank: int, count: int, port: int) -> int:
    """Be a rank: a user's command, with the environment that torchrun would give it."""
    from trainer import run

    if count > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    return run.main([*SETTINGS, f"name={run_dir.name}", f"run_dir={run_dir}"])


def _free_port() -> int:
    """Return a free port below those that the kernel assigns automatically."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


# --- what can be seen of a run -----------------------------------------------------------------


class Watch:
    """Progress of an attempt, observed from outside."""

    def __init__(self, run_dir: Path) -> None:
        self._attempts, self._checkpoints = run_dir / "attempts", run_dir / "checkpoints"
        self._earlier_folders = set(_names(self._checkpoints))
        self.earlier_attempts = len(self._records())

    def _records(self) -> list[str]:
        return [name for name in _names(self._attempts) if not _is_temporary(name)]

    def has_begun(self) -> bool:
        """Return whether the attempt has a record, and so owns the run."""
        return len(self._records()) > self.earlier_attempts

    def is_training(self) -> bool:
        """Return whether it has recorded where it starts from; its first step comes next."""
        if not self.has_begun():
            return False
        record = json.loads((self._attempts / max(self._records())).read_text())
        return "resumed_from" in record

    def is_saving(self) -> bool:
        """Return whether a checkpoint of this attempt is being written (or deleted)."""
        from trainer.checkpoint.lineage import MANIFEST

        return any(MANIFEST not in files for _, files in self._folders())

    def is_publishing(self) -> bool:
        """Return whether a manifest is being published."""
        return any(_is_temporary(name) for _, files in self._folders() for name in files)

    def committed_step(self) -> int:
        """Return the newest step that this attempt has committed, or 0."""
        from trainer.checkpoint.lineage import MANIFEST

        return max((step for step, files in self._folders() if MANIFEST in files), default=0)

    def _folders(self) -> list[tuple[int, list[str]]]:
        """Return the step and files of each checkpoint of this attempt."""
        from trainer.checkpoint.manifest import parse_folder

        folders = set(_names(self._checkpoints)) - self._earlier_folders
        parsed = [(parse_folder(name), _names(self._checkpoints / name)) for name in folders]
        return [(finding[0], files) for finding, files in parsed if finding]


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _is_temporary(name: str) -> bool:
    """Return whether a file has not been given its name yet, as a LocalStore does it."""
    return name.startswith(".tmp-")


@dataclass(frozen=True)
class Finding:
    """Files of a killed attempt, every byte verified."""

    newest_step: int
    """Step of the newest checkpoint; 0 without one."""
    resumed_step: int | None
    """Step that the attempt recorded as its start, if any."""
    state: str
    """Activity, one of STATES."""
    left_files: int
    """Files of no use, which a later attempt has to delete."""


def examine(run_dir: Path, earlier_attempts: int) -> dict[str, Any]:
    """Return a Finding as a dict. It computes: call it in a child."""
    from trainer import checkpoint
    from trainer.checkpoint import lineage
    from trainer.storage import LocalStore

    store = LocalStore(run_dir)
    newest, commits = checkpoint.latest(store), checkpoint.steps(store)
    for commit in commits:
        checkpoint.verify(store, lineage.read_manifest(store, commit))
    records = lineage.records(store)
    record = records[-1] if len(records) > earlier_attempts else {}
    start = record.get("resumed_from")
    return vars(
        Finding(
            newest_step=newest.step if newest else 0,
            resumed_step=start["step"] if start else None,
            state=_state(run_dir, record["attempt"], commits) if start else START_UP,
            left_files=len(useless_files(run_dir)),
        )
    )


def _state(run_dir: Path, attempt: int, commits: Sequence[Any]) -> str:
    """Return the activity of an attempt that had started to train. Saves follow each other."""
    from trainer.checkpoint.lineage import MANIFEST
    from trainer.checkpoint.manifest import parse_folder

    newest_step = commits[-1].step if commits else 0
    checkpoints = run_dir / "checkpoints"
    folders = {name: _names(checkpoints / name) for name in _names(checkpoints)}
    has_committed = any(commit.attempt == attempt for commit in commits)
    used = [name for name, files in folders.items() if not all(map(_is_temporary, files))]
    state = PRUNING if has_committed and len(used) > KEEP_LAST else TRAINING
    for name, files in folders.items():
        parsed = parse_folder(name)
        if parsed is None or parsed[1] != attempt:
            continue  # an earlier attempt left it
        if MANIFEST not in files and parsed[0] > newest_step:
            return PUBLISHING if any(map(_is_temporary, files)) else WRITING
        if MANIFEST not in files or any(map(_is_temporary, files)):
            state = PRUNING
    return state


def useless_files(run_dir: Path) -> list[str]:
    """Return the files that belong neither to the run itself nor to a checkpoint that counts."""
    from trainer.checkpoint import lineage
    from trainer.storage import LocalStore

    store = LocalStore(run_dir)
    useful = {"config.yaml", "metrics.jsonl", *store.list("attempts")}
    for commit in lineage.commits(store):
        shards = lineage.read_manifest(store, commit).files
        useful |= {commit.manifest_key, *(f"{commit.folder}/{shard}" for shard in shards)}
    files = (path for path in run_dir.rglob("*") if path.is_file())
    return sorted({path.relative_to(run_dir).as_posix() for path in files} - useful)


def compare(undisturbed: Path, run_dir: Path) -> tuple[list[str], list[str]]:
    """Return how two finished runs differ, and the second's useless files. For a child."""
    from scripts.compare_runs import differences

    return differences(str(undisturbed), str(run_dir)), useless_files(run_dir)


# --- kills -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shot:
    """Time of a kill and its first victim. Times are in steps of the undisturbed run."""

    aim: str
    """Activity to wait for: START_UP, TRAINING, WRITING or PUBLISHING."""
    lead: float
    """Training time before that, if the aim is a save."""
    delay: float
    """Wait after it."""
    first: int | None
    """The rank that dies first, or None: all at the same time."""
    ahead: float
    """Time between the first kill and the kill of the others."""


_AIMS = {START_UP: (1, 8.0), TRAINING: (3, 20.0), WRITING: (3, 0.5), PUBLISHING: (3, 0.2)}
"""Weight of each aim, and its longest delay."""


def draw(dice: random.Random, ranks: int) -> Shot:
    """Draw a kill."""
    (aim,) = dice.choices(list(_AIMS), [weight for weight, _ in _AIMS.values()])
    one_first = ranks > 1 and dice.random() < 0.5
    return Shot(
        aim,
        lead=dice.uniform(0.0, 12.0),
        delay=dice.uniform(0.0, _AIMS[aim][1]),
        first=dice.randrange(ranks) if one_first else None,
        ahead=dice.uniform(0.0, 20.0),
    )


@dataclass
class Tally:
    """Tally of the kills for one number of ranks."""

    kills: int = 0
    states: Counter[str] = field(default_factory=Counter)
    one_first: int = 0
    early_exits: int = 0
    """Ranks that exited when a peer was killed."""
    max_orphaned_files: int = 0
    runs: int = 0
    end_files: int = 0
    """Useless files of finished runs."""


class Run:
    """A run that is killed again and again, and what it has promised so far."""

    def __init__(self, run_dir: Path, ranks: int, tally: Tally, step_s: float) -> None:
        self.newest_step = 0
        """Step of the newest checkpoint after the last kill; 0 without one."""
        self._seen_step = 0
        """The newest that was ever seen committed, also while an attempt was alive."""
        self._run_dir, self._ranks, self._tally, self._step_s = run_dir, ranks, tally, step_s
        self._log = log_of(run_dir)

    def strike(self, shot: Shot) -> bool:
        """Start an attempt and kill it; return False if the run came to its end before."""
        watch = Watch(self._run_dir)
        ranks = Ranks(self._run_dir, self._ranks, self._log)
        if not self._take_aim(shot, watch, ranks) or not ranks.alive():
            ranks.let_end()
            return False
        if shot.first is not None and shot.first in ranks.alive():
            ranks.kill([shot.first])
            self._tally.one_first += 1
            until_s = time.monotonic() + shot.ahead * self._step_s
            while time.monotonic() < until_s and ranks.alive():
                time.sleep(_POLL_S)
        self._see(watch)
        ranks.kill(ranks.alive())
        finding = ask(lambda: examine(self._run_dir, watch.earlier_attempts), self._log)
        self._check(Finding(**finding), ranks.codes)
        return True

    def _take_aim(self, shot: Shot, watch: Watch, ranks: Ranks) -> bool:
        """Wait for the instant; return False if a rank exited early before."""
        if shot.aim == START_UP:
            return ranks.wait(watch.has_begun) and self._pause(shot.delay, watch, ranks)
        if not ranks.wait(watch.is_training):
            return False
        if shot.aim in (WRITING, PUBLISHING):
            goal = watch.is_saving if shot.aim == WRITING else watch.is_publishing
            if not (self._pause(shot.lead, watch, ranks) and ranks.wait(goal)):
                return False
        return self._pause(shot.delay, watch, ranks)

    def _pause(self, steps: float, watch: Watch, ranks: Ranks) -> bool:
        until_s = time.monotonic() + steps * self._step_s
        went_on = ranks.wait(lambda: time.monotonic() >= until_s)
        self._see(watch)
        return went_on

    def _see(self, watch: Watch) -> None:
        self._seen_step = max(self._seen_step, watch.committed_step())

    def _check(self, finding: Finding, codes: Mapping[int, int]) -> None:
        """Compare a finding with the promises, and count it."""
        if finding.resumed_step not in (None, self.newest_step):
            raise Broken(
                f"the newest checkpoint was of step {self.newest_step}, and the next attempt "
                f"resumed from step {finding.resumed_step}"
            )
        if finding.newest_step < self._seen_step:
            raise Broken(
                f"step {self._seen_step} was committed; after a kill ({finding.state}) the newest "
                f"checkpoint is of step {finding.newest_step}"
            )
        for rank, code in codes.items():
            if code not in ((0, 1) if finding.newest_step == LAST_STEP else (1,)):
                raise Broken(
                    f"rank {rank} left with {code} when its peer was killed; the newest checkpoint "
                    f"is of step {finding.newest_step} of {LAST_STEP}"
                )
        self.newest_step = self._seen_step = finding.newest_step
        self._tally.kills += 1
        self._tally.states[finding.state] += 1
        self._tally.early_exits += len(codes)
        self._tally.max_orphaned_files = max(self._tally.max_orphaned_files, finding.left_files)

    def end(self, undisturbed: Path) -> None:
        """Let the run end, and compare it with one that was never killed."""
        was_over = self.newest_step == LAST_STEP
        Ranks(self._run_dir, self._ranks, self._log).let_end()
        finding, useless = ask(lambda: compare(undisturbed, self._run_dir), self._log)
        if finding:
            text = "\n".join(line[:300] for line in finding[:20])
            raise Broken(f"the end differs from that of an undisturbed run:\n{text}")
        shards = [name for name in useless if name.endswith(".safetensors")]
        if shards and not was_over:  # else no attempt has saved, and so cleaned up, since the kill
            raise Broken("a finished run keeps shards of no checkpoint:\n" + "\n".join(shards))
        self._tally.runs += 1
        self._tally.end_files += len(useless)


def log_of(run_dir: Path) -> Path:
    """Return the file with all that the processes of a run have printed."""
    return run_dir.with_name(run_dir.name + ".log")


class Campaign:
    """All kills of one call of this script."""

    def __init__(self, folder: Path, kills: int, dice: random.Random, *, keep: bool) -> None:
        self.tallies: dict[int, Tally] = {}
        self.began_s = time.monotonic()
        self.run_dir = folder
        """The run that is being killed."""
        self._folder, self._kills, self._dice, self._keep = folder, kills, dice, keep

    def torture(self, ranks: int, kills: int) -> None:
        """Kill runs with this number of ranks, one after the other, until the kills are used up."""
        tally = self.tallies[ranks] = Tally()
        undisturbed = self.run_dir = self._folder / f"ranks-{ranks}-undisturbed"
        began_s = time.monotonic()
        Ranks(undisturbed, ranks, log_of(undisturbed)).let_end()
        step_s = (time.monotonic() - began_s) / LAST_STEP
        number = 0
        while tally.kills < kills:
            number += 1
            self.run_dir = self._folder / f"ranks-{ranks}-run-{number}"
            run = Run(self.run_dir, ranks, tally, step_s)
            while tally.kills < kills and run.strike(draw(self._dice, ranks)):
                self._report(f"{self.run_dir.name} at step {run.newest_step}")
            run.end(undisturbed)
            if not self._keep:
                shutil.rmtree(self.run_dir)

    def _report(self, where: str) -> None:
        kills = sum(tally.kills for tally in self.tallies.values())
        if kills % 10 == 0:
            seconds = time.monotonic() - self.began_s
            print(f"{kills:6,} of {self._kills:,} kills  {seconds:6.0f} s  {where}", flush=True)

    def table(self) -> str:
        """Return the tally as a table with a column for each number of ranks, and their sum."""
        tallies = list(self.tallies.values())
        rows: list[tuple[str, list[int], Callable[[list[int]], int]]] = [
            ("kills", [t.kills for t in tallies], sum),
            *((f"  {state}", [t.states[state] for t in tallies], sum) for state in STATES),
            ("one rank died first", [t.one_first for t in tallies], sum),
            ("  others exited early", [t.early_exits for t in tallies], sum),
            ("useless files, most after a kill", [t.max_orphaned_files for t in tallies], max),
            ("useless files, in ended runs", [t.end_files for t in tallies], sum),
            ("runs that ended bit-identical", [t.runs for t in tallies], sum),
        ]
        heads = [f"{ranks} rank{'s' * (ranks > 1)}" for ranks in self.tallies]
        lines = [" " * 34 + "".join(f"{head:>9}" for head in [*heads, "all"])]
        for name, numbers, total in rows:
            cells = [*numbers, total(numbers)]
            lines.append(f"{name:<34}" + "".join(f"{cell:9,}" for cell in cells))
        return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500, help="in all (default: 500)")
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks (default: 1,2)")
    parser.add_argument("--seed", type=int, default=0, help="of the aims (default: 0)")
    parser.add_argument("--folder", type=Path, help="for the runs; stays (default: a temporary)")
    arguments = parser.parse_args()
    arguments.ranks = [int(text) for text in arguments.ranks.split(",")]
    if any(count < 1 or GLOBAL_BATCH_SIZE % count for count in arguments.ranks):
        parser.error(f"--ranks: each must divide the {GLOBAL_BATCH_SIZE} samples of a step")
    if arguments.folder is not None and _names(arguments.folder):
        parser.error(f"--folder: {arguments.folder} is not empty")
    return arguments


def main() -> int:
    """Kill, and print the tally."""
    arguments = _parse()
    keep = arguments.folder is not None
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="perdure-chaos-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    preload()
    campaign = Campaign(folder, arguments.kills, random.Random(arguments.seed), keep=keep)
    code = 1
    try:
        for index, ranks in enumerate(arguments.ranks):
            count, rest = divmod(arguments.kills, len(arguments.ranks))
            campaign.torture(ranks, count + (index < rest))
        code = 0
    except Broken as error:
        log = log_of(campaign.run_dir)
        print(f"\nBROKEN: {error}\n\nThe run: {campaign.run_dir}\nThe end of {log}:")
        print("\n".join(log.read_text(errors="replace").splitlines()[-30:]), end="\n\n")
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    finally:
        kill_children()
        if not keep and code != 1:
            shutil.rmtree(folder, ignore_errors=True)
    print(campaign.table())
    messages = {0: "Every promise held.", 1: f"A promise is broken; see {folder}."}
    print(f"{time.monotonic() - campaign.began_s:.0f} s. {messages.get(code, 'Interrupted.')}")
    return code


if __name__ == "__main__":
    sys.exit(main())
