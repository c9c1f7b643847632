"""A damaged checkpoint is reported and marked; the run resumes from the newest intact one."""

import pytest
from support.run_commands import HARD, committed

from scripts.compare_runs import differences

KEEP = [*HARD, "checkpoint.keep_last=3", "task._target_=mine.task.Fragile"]


@pytest.fixture
def stopped_run(command):
    """A run with three checkpoints, the last at step 18.

    The earlier ones are at steps 10 and 15, or a step or two later if the disk is slow.
    """
    assert command(*KEEP, "name=a", TERM_AT="0:18").returncode == 75
    run = command.folder / "runs/a"
    assert len(committed(run)) == 3
    assert committed(run)[-1] == 18
    return run


def shard_of(run, step):
    (shard,) = run.glob(f"checkpoints/step-{step:08d}.*/*.safetensors")
    return shard


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
def test_resume_skips_damage_with_a_warning_and_ends_with_identical_results(
    command, stopped_run, damage
):
    assert command(*KEEP, "name=b").returncode == 0
    damaged, fallback = shard_of(stopped_run, 18), committed(stopped_run)[-2]
    damage(damaged)
    done = command(*KEEP, "name=a")
    assert done.returncode == 0, done.stderr
    assert "warning: damaged checkpoint: " in done.stdout
    assert damaged.name in done.stdout
    assert f"resuming from step {fallback}; {40 - fallback} steps left" in done.stdout
    assert (damaged.parent / "damaged.json").exists()
    assert (damaged.parent / "manifest.json").exists()
    assert differences(str(stopped_run), str(command.folder / "runs/b")) == []


@pytest.mark.slow
def test_damaged_manifest_is_skipped_with_a_warning(command, stopped_run):
    fallback = committed(stopped_run)[-2]
    manifest = shard_of(stopped_run, 18).parent / "manifest.json"
    flip_one_bit(manifest)
    done = command(*KEEP, "name=a")
    assert done.returncode == 0, done.stderr
    assert "warning: skipped checkpoint: " in done.stdout
    assert f"resuming from step {fallback};" in done.stdout


def test_resume_from_a_damaged_step_fails_and_lists_older_checkpoints(command, stopped_run):
    flip_one_bit(shard_of(stopped_run, 18))
    oldest, middle, _ = committed(stopped_run)
    done = command(*KEEP, "name=a", "resume=18")
    assert done.returncode == 1
    assert "checksum mismatch" in done.stderr
    assert f"Older checkpoints: steps {middle}, {oldest}. Resume from one with resume={middle}" in (
        done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_damage_detected_by_one_of_two_ranks_makes_both_fall_back(command):
    two = [*KEEP, "name=a", "launch.nproc=2"]
    assert command(*two, TERM_AT="0:17").returncode == 75
    run = command.folder / "runs/a"
    *_, fallback, last = committed(run)
    (shard,) = run.glob(f"checkpoints/step-{last:08d}.*/r00001-*")
    truncate(shard)
    done = command(*two)
    assert done.returncode == 0, done.stderr
    assert f"resuming from step {fallback};" in done.stdout


@pytest.mark.slow
def test_run_with_only_damaged_checkpoints_fails_and_does_not_start_over(command, stopped_run):
    for step in committed(stopped_run):
        truncate(shard_of(stopped_run, step))
    done = command(*KEEP, "name=a")
    assert done.returncode == 1
    assert "every checkpoint in" in done.stderr
    again = command(*KEEP, "name=a")
    assert again.returncode == 1
    assert "every checkpoint in" in again.stderr
    assert len(list(stopped_run.glob("checkpoints/*/manifest.json"))) == 3
