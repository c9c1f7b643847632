"""SIGKILL at random instants of a real training that saves every few steps, and a tally.

python -m scripts.chaos [--kills 500] [--ranks 1,2] [--seed 0] [--folder DIR]

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
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripts.chaos_findings import (
    PUBLISHING,
    START_UP,
    STATES,
    TRAINING,
    WRITING,
    Finding,
    Watch,
    compare,
    examine,
    file_names,
)
from scripts.chaos_ranks import (
    GLOBAL_BATCH_SIZE,
    LAST_STEP,
    POLL_S,
    Broken,
    Ranks,
    ask,
    kill_children,
    preload,
)


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
                time.sleep(POLL_S)
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
    if arguments.folder is not None and file_names(arguments.folder):
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
