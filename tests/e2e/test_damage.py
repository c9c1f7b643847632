"""A damaged checkpoint: named, set aside, and the newest whole one taken instead, loudly."""

import pytest
from commands import HARD

from scripts.compare_runs import differences

KEEP = [*HARD, "checkpoint.keep_last=3", "task._target_=mine.task.Fragile"]


@pytest.fixture
def stopped(command):
    """A run that has the checkpoints 10, 15 and 18."""
    assert command(*KEEP, "name=a", TERM_AT="0:18").returncode == 75
    return command.folder / "runs/a"


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
    damaged = shard_of(stopped, 18)
    damage(damaged)
    went_on = command(*KEEP, "name=a")
    assert went_on.returncode == 0, went_on.stderr
    assert "DAMAGED: " in went_on.stdout
    assert damaged.name in went_on.stdout
    assert "resuming from step 15; 25 steps left" in went_on.stdout
    assert (damaged.parent / "damaged.json").exists()
    assert (damaged.parent / "manifest.json").exists()
    assert differences(str(stopped), str(command.folder / "runs/b")) == []


@pytest.mark.slow
def test_a_damaged_manifest_is_passed_over_too(command, stopped):
    manifest = shard_of(stopped, 18).parent / "manifest.json"
    flip_one_bit(manifest)
    went_on = command(*KEEP, "name=a")
    assert went_on.returncode == 0, went_on.stderr
    assert "PASSED OVER: " in went_on.stdout
    assert "resuming from step 15" in went_on.stdout


def test_a_named_step_that_is_damaged_is_an_error_that_lists_the_older_ones(command, stopped):
    flip_one_bit(shard_of(stopped, 18))
    refused = command(*KEEP, "name=a", "resume=18")
    assert refused.returncode == 1
    assert "do not match their checksum" in refused.stderr
    assert "Older whole steps: 15, 10; resume from one of them with resume=15" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_with_two_ranks_damage_that_one_rank_sees_turns_all(command):
    two = [*KEEP, "name=a", "launch.nproc=2"]
    assert command(*two, TERM_AT="0:17").returncode == 75
    run = command.folder / "runs/a"
    for path in run.glob("checkpoints/step-00000018.*/r00001-*"):
        truncate(path)
    went_on = command(*two)
    assert went_on.returncode == 0, went_on.stderr
    assert "resuming from step 15" in went_on.stdout


@pytest.mark.slow
def test_when_none_is_whole_the_run_is_refused_and_nothing_is_begun_anew(command, stopped):
    for step in (10, 15, 18):
        truncate(shard_of(stopped, step))
    refused = command(*KEEP, "name=a")
    assert refused.returncode == 1
    assert "none of them is whole" in refused.stderr
    again = command(*KEEP, "name=a")
    assert again.returncode == 1
    assert "none of them is whole" in again.stderr
    assert len(list(stopped.glob("checkpoints/*/manifest.json"))) == 3
