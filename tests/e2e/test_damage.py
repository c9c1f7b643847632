"""A damaged checkpoint: named, set aside, and the newest whole one taken instead, loudly."""

import pytest
from support.run_commands import HARD, committed

from scripts.compare_runs import differences

KEEP = [*HARD, "checkpoint.keep_last=3", "task._target_=mine.task.Fragile"]


@pytest.fixture
def stopped(command):
    """A run that has three checkpoints, the last of them of step 18.

    The ones before are of steps 10 and 15, or, where the disk is slow, of a step or two after.
    """
    assert command(*KEEP, "name=a", TERM_AT="0:18").returncode == 75
    run = command.folder / "runs/a"
    assert len(committed(run)) == 3
    assert committed(run)[-1] == 18
    return run


def shard_of(run, step):
    (found,) = run.glob(f"checkpoints/step-{step:08d}.*/*.safetensors")
    return found


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        flip_one_bit,
        pytest.param(truncate, marks=pytest.mark.slow),
        pytest.param(remove, marks=pytest.mark.slow),
    ],
)
def test_auto_falls_back_to_the_newest_whole_one_loudly_and_ends_the_same(command, stopped, damage):
    assert command(*KEEP, "name=b").returncode == 0
    damaged, whole = shard_of(stopped, 18), committed(stopped)[-2]
    damage(damaged)
    went_on = command(*KEEP, "name=a")
    assert went_on.returncode == 0, went_on.stderr
    assert "warning: damaged checkpoint: " in went_on.stdout
    assert damaged.name in went_on.stdout
    assert f"resuming from step {whole}; {40 - whole} steps left" in went_on.stdout
    assert (damaged.parent / "damaged.json").exists()
    assert (damaged.parent / "manifest.json").exists()
    assert differences(str(stopped), str(command.folder / "runs/b")) == []


@pytest.mark.slow
def test_a_damaged_manifest_is_passed_over_too(command, stopped):
    whole = committed(stopped)[-2]
    manifest = shard_of(stopped, 18).parent / "manifest.json"
    flip_one_bit(manifest)
    went_on = command(*KEEP, "name=a")
    assert went_on.returncode == 0, went_on.stderr
    assert "warning: skipped checkpoint: " in went_on.stdout
    assert f"resuming from step {whole};" in went_on.stdout


def test_a_named_step_that_is_damaged_is_an_error_that_lists_the_older_ones(command, stopped):
    flip_one_bit(shard_of(stopped, 18))
    oldest, whole, _ = committed(stopped)
    refused = command(*KEEP, "name=a", "resume=18")
    assert refused.returncode == 1
    assert "checksum mismatch" in refused.stderr
    assert f"Older checkpoints: steps {whole}, {oldest}. Resume from one with resume={whole}" in (
        refused.stderr
    )
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_with_two_ranks_damage_that_one_rank_sees_turns_all(command):
    two = [*KEEP, "name=a", "launch.nproc=2"]
    assert command(*two, TERM_AT="0:17").returncode == 75
    run = command.folder / "runs/a"
    *_, whole, last = committed(run)
    (shard,) = run.glob(f"checkpoints/step-{last:08d}.*/r00001-*")
    truncate(shard)
    went_on = command(*two)
    assert went_on.returncode == 0, went_on.stderr
    assert f"resuming from step {whole};" in went_on.stdout


@pytest.mark.slow
def test_when_none_is_whole_the_run_is_refused_and_nothing_is_begun_anew(command, stopped):
    for step in committed(stopped):
        truncate(shard_of(stopped, step))
    refused = command(*KEEP, "name=a")
    assert refused.returncode == 1
    assert "every checkpoint in" in refused.stderr
    again = command(*KEEP, "name=a")
    assert again.returncode == 1
    assert "every checkpoint in" in again.stderr
    assert len(list(stopped.glob("checkpoints/*/manifest.json"))) == 3
