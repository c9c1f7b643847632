"""A run that lives on a real S3 server: killed, preempted, resumed, pruned, exported."""

import json
import shutil
import signal
import uuid

import pytest
from support.run_commands import HARD, committed

from scripts.compare_runs import differences
from scripts.s3_server import BUCKET, KEY, SECRET
from trainer.checkpoint import lineage
from trainer.storage import open_store
from trainer.tracking import jsonl

FRAGILE = [*HARD, "task._target_=mine.task.Fragile"]


@pytest.fixture
def bucket(s3, command):
    """The URL of a place for runs, which the command's processes can reach."""
    command.env |= s3.environment
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def steps_of(store):
    return [line["step"] for line in jsonl.read(store) if line["split"] == "train"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_after_sigkill_and_preemption_the_run_ends_with_the_same_bits(command, bucket, ranks):
    whole = [*FRAGILE, f"run_dir={bucket}/whole", f"launch.nproc={ranks}"]
    broken = [*FRAGILE, f"run_dir={bucket}/broken", f"launch.nproc={ranks}"]
    assert command(*whole).returncode == 0
    (command.folder / "a file").touch()  # what Fragile waits for before it dies
    killed = command(*broken, DIE_AT=f"{ranks - 1}:13")
    assert killed.returncode in (-signal.SIGKILL, 75), killed.stderr
    stopped = command(*broken, TERM_AT="0:9")
    assert stopped.returncode == 75, stopped.stderr
    done = command(*broken)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stdout
    store = open_store(f"{bucket}/broken")
    assert differences(f"{bucket}/whole", store.url) == []
    assert steps_of(store) == list(range(1, 41))
    assert len(lineage.commits(store)) == 2  # keep_last
    kept = [commit.folder for commit in lineage.commits(store)]
    assert all(key.startswith(tuple(kept)) for key in store.list("checkpoints", unfinished=True))
    assert [key for key in store.list("") if key.startswith("metrics")] == ["metrics.jsonl"]


def test_the_weights_are_exported_into_the_bucket_and_nothing_lands_on_the_disk(command, bucket):
    run = f"{bucket}/a"
    assert command(*FRAGILE, f"run_dir={run}", "trainer.max_steps=6").returncode == 0
    exported = command(run, "format=safetensors", module="trainer.export")
    assert exported.returncode == 0, exported.stderr
    assert exported.stdout.startswith(f"{run}/exports/step-00000006.safetensors: ")
    assert open_store(run).size("exports/step-00000006.safetensors") > 1000
    assert list(command.folder.iterdir()) == []


def test_no_credentials_reach_the_run_or_what_it_prints(command, bucket):
    run = f"{bucket}/a"
    arguments = [*FRAGILE, f"run_dir={run}", "trainer.max_steps=3", "launch.nproc=2"]
    mine = [f"+store.options.key={KEY}", f"+store.options.secret={SECRET}"]
    done = command(*arguments, *mine)
    assert done.returncode == 0, done.stderr
    wrong = command(
        *arguments,
        "name=b",
        mine[0],
        "+store.options.secret=my-own-wrong-secret",
        f"run_dir={run}b",
    )
    assert wrong.returncode == 2
    assert "cannot be written" in wrong.stderr
    store = open_store(run)
    told = [done.stdout, done.stderr, wrong.stdout, wrong.stderr]
    told += [store.read(key).decode("latin-1") for key in store.list("")]
    assert not any(SECRET in text or "my-own-wrong-secret" in text for text in told)
    config = lineage.read_manifest(store, lineage.commits(store)[-1]).config
    assert config["store"]["options"] == {"key": "<redacted>", "secret": "<redacted>"}


def test_a_server_that_dies_and_comes_back_costs_nothing_but_time(command, bucket, s3, wait_for):
    whole, run = [*FRAGILE, f"run_dir={bucket}/whole"], f"{bucket}/a"
    assert command(*whole).returncode == 0
    process = command.start(*FRAGILE, f"run_dir={run}", STEP_S="0.2")
    store = open_store(run)
    wait_for(lambda: lineage.commits(store) != [], process)
    s3.kill()
    s3.start()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, (out, err)
    assert differences(f"{bucket}/whole", run) == []


def test_a_bucket_that_is_not_there_is_named(command, bucket):
    done = command(*FRAGILE, "run_dir=s3://no-such-bucket-here/a")
    assert done.returncode == 2
    assert "no-such-bucket-here" in done.stderr
    assert "create the bucket" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fork_begins_from_a_checkpoint_in_the_bucket(command, bucket):
    run = f"{bucket}/a"
    assert command(*FRAGILE, f"run_dir={run}", "trainer.max_steps=6").returncode == 0
    store = open_store(run)
    folder = lineage.commits(store)[-1].folder
    forked = command(*FRAGILE, "name=b", f"resume={run}/{folder}")
    assert forked.returncode == 0, forked.stderr
    assert f"forking {run}/{folder} from step 6" in forked.stdout
    record = json.loads((command.folder / "runs/b/attempts/0001.json").read_text())
    assert record["outcome"] == "done"


def test_training_goes_on_without_the_mirror_which_catches_up(command, bucket, s3, wait_for):
    assert command(*FRAGILE, "name=whole").returncode == 0
    mirror, run = f"{bucket}/a", command.folder / "runs/a"
    arguments = [*FRAGILE, "name=a", f"checkpoint.mirror={mirror}", "store.retries=1"]
    process = command.start(*arguments, STEP_S="0.3", PAUSE_AT="0:33")
    store = open_store(mirror)
    wait_for(lambda: lineage.commits(store) != [], process)
    s3.kill()
    wait_for((command.folder / "paused").exists, process)
    assert committed(run)[-1] >= 25
    s3.start()
    (command.folder / "paused").unlink()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, (out, err)
    assert "the mirror is behind" in out
    assert "it is no longer behind" in out
    assert lineage.commits(store)[-1].step == 40
    shutil.rmtree(run)
    again = command(*arguments)
    assert "is finished at step 40" in again.stdout, again.stderr
    assert differences(mirror, str(command.folder / "runs/whole")) == []
