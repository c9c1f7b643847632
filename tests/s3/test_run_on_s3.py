"""A run stored on a real S3 server: killed, preempted, resumed, pruned, exported."""

import json
import shutil
import signal
import uuid

import pytest
from support.run_commands import HARD, committed
from support.s3_proxy import Fault, Proxy

from scripts.compare_runs import differences
from scripts.s3_server import BUCKET, KEY, SECRET
from trainer.checkpoint import lineage
from trainer.storage import open_store
from trainer.tracking import jsonl

FRAGILE = [*HARD, "task._target_=mine.task.Fragile"]


@pytest.fixture
def bucket(s3, command):
    """The URL of a folder for runs, with credentials in the command's environment."""
    command.env |= s3.environment
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def steps_of(store):
    return [line["step"] for line in jsonl.read(store) if line["split"] == "train"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_run_after_sigkill_and_preemption_ends_with_identical_results(command, bucket, ranks):
    uninterrupted = [*FRAGILE, f"run_dir={bucket}/uninterrupted", f"launch.nproc={ranks}"]
    broken = [*FRAGILE, f"run_dir={bucket}/broken", f"launch.nproc={ranks}"]
    assert command(*uninterrupted).returncode == 0
    (command.folder / "a file").touch()  # Fragile waits for a file before it kills itself
    killed = command(*broken, DIE_AT=f"{ranks - 1}:13")
    assert killed.returncode in (-signal.SIGKILL, 75), killed.stderr
    stopped = command(*broken, TERM_AT="0:9")
    assert stopped.returncode == 75, stopped.stderr
    done = command(*broken)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stdout
    store = open_store(f"{bucket}/broken")
    assert differences(f"{bucket}/uninterrupted", store.url) == []
    assert steps_of(store) == list(range(1, 41))
    assert len(lineage.commits(store)) == 2  # keep_last
    folders = [commit.folder for commit in lineage.commits(store)]
    assert all(key.startswith(tuple(folders)) for key in store.list("checkpoints", unfinished=True))
    assert [key for key in store.list("") if key.startswith("metrics")] == ["metrics.jsonl"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("status", "code"), [(403, 1), (503, 75)])
def test_run_whose_saves_fail_exits_with_1_only_if_they_would_fail_again(
    command, bucket, s3, ranks, status, code
):
    proxy = Proxy(s3.endpoint)
    end_of_epoch = "step-00000020"  # saved at its own step, also if another save is in flight
    proxy.faults = [Fault("answer", -1, "PUT", end_of_epoch, status=status, code="Rejected")]
    try:
        failed = command(
            *FRAGILE, f"run_dir={bucket}/a", f"launch.nproc={ranks}", "checkpoint.on_error=stop",
            f"store.endpoint_url={proxy.endpoint}", "store.retries=1",
        )  # fmt: skip
    finally:
        proxy.close()
    assert failed.returncode == code, failed.stderr
    assert "Rejected" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert proxy.faults[0].met > 0


@pytest.mark.parametrize(("status", "code"), [(400, 2), (403, 2), (503, 75)])
def test_store_that_rejects_a_part_is_detected_before_the_start(command, bucket, s3, status, code):
    proxy = Proxy(s3.endpoint)
    proxy.faults = [Fault("answer", -1, "PUT", "partNumber", status=status, code="Rejected")]
    try:
        failed = command(
            *FRAGILE, f"run_dir={bucket}/a", f"store.endpoint_url={proxy.endpoint}",
            "store.retries=1",
        )  # fmt: skip
    finally:
        proxy.close()
    assert failed.returncode == code, failed.stderr
    assert f"run_dir={bucket}/a cannot be written" in failed.stderr
    assert open_store(f"{bucket}/a").list("", unfinished=True) == []


def test_export_is_written_to_the_bucket_and_not_to_the_disk(command, bucket):
    run = f"{bucket}/a"
    assert command(*FRAGILE, f"run_dir={run}", "trainer.max_steps=6").returncode == 0
    exported = command(run, "format=safetensors", module="trainer.export")
    assert exported.returncode == 0, exported.stderr
    assert exported.stdout.startswith(f"{run}/exports/step-00000006.safetensors: ")
    assert open_store(run).size("exports/step-00000006.safetensors") > 1000
    assert list(command.folder.iterdir()) == []


def test_evaluate_asks_for_user_targets_of_a_copy_but_not_of_the_users_run(command, bucket):
    run = f"{bucket}/a"
    assert command(*FRAGILE, f"run_dir={run}", "trainer.max_steps=6").returncode == 0
    done = command(run, module="trainer.evaluate")
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    copied = command("copy", run, f"{bucket}/copy", module="trainer.checkpoints")
    assert copied.returncode == 0, copied.stderr
    asked = command(f"{bucket}/copy", module="trainer.evaluate")
    assert asked.returncode == 2
    assert "allow=mine.task.Fragile" in asked.stderr


def test_credentials_are_neither_stored_in_the_run_nor_printed(command, bucket):
    run = f"{bucket}/a"
    arguments = [*FRAGILE, f"run_dir={run}", "trainer.max_steps=3", "launch.nproc=2"]
    credentials = [
        f"+store.options.access_key_id={KEY}",
        f"+store.options.secret_access_key={SECRET}",
    ]
    done = command(*arguments, *credentials)
    assert done.returncode == 0, done.stderr
    wrong = command(
        *arguments,
        "name=b",
        credentials[0],
        "+store.options.secret_access_key=my-own-wrong-secret",
        f"run_dir={run}b",
    )
    assert wrong.returncode == 2
    assert "cannot be written" in wrong.stderr
    store = open_store(run)
    texts = [done.stdout, done.stderr, wrong.stdout, wrong.stderr]
    texts += [store.read(key).decode("latin-1") for key in store.list("")]
    assert not any(SECRET in text or "my-own-wrong-secret" in text for text in texts)
    config = lineage.read_manifest(store, lineage.commits(store)[-1]).config
    assert config["store"]["options"] == {
        "access_key_id": "<redacted>",
        "secret_access_key": "<redacted>",
    }


def test_server_restart_leaves_the_result_unchanged(command, bucket, s3, wait_for):
    uninterrupted, run = [*FRAGILE, f"run_dir={bucket}/uninterrupted"], f"{bucket}/a"
    assert command(*uninterrupted).returncode == 0
    process = command.start(*FRAGILE, f"run_dir={run}", STEP_S="0.2")
    store = open_store(run)
    wait_for(lambda: lineage.commits(store) != [], process)
    s3.kill()
    s3.start()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, (out, err)
    assert differences(f"{bucket}/uninterrupted", run) == []


def test_missing_bucket_is_named_in_the_error(command, bucket):
    done = command(*FRAGILE, "run_dir=s3://missing-bucket-here/a")
    assert done.returncode == 2
    assert "missing-bucket-here" in done.stderr
    assert "create the bucket" in done.stderr
    assert "Traceback" not in done.stderr


def test_fork_starts_from_a_checkpoint_in_the_bucket(command, bucket):
    run = f"{bucket}/a"
    assert command(*FRAGILE, f"run_dir={run}", "trainer.max_steps=6").returncode == 0
    store = open_store(run)
    folder = lineage.commits(store)[-1].folder
    forked = command(*FRAGILE, "name=b", f"resume={run}/{folder}")
    assert forked.returncode == 0, forked.stderr
    assert f"forking {run}/{folder} from step 6" in forked.stdout
    record = json.loads((command.folder / "runs/b/attempts/0001.json").read_text())
    assert record["outcome"] == "done"


def test_training_continues_without_its_mirror_which_catches_up(command, bucket, s3, wait_for):
    assert command(*FRAGILE, "name=uninterrupted").returncode == 0
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
    assert differences(mirror, str(command.folder / "runs/uninterrupted")) == []
