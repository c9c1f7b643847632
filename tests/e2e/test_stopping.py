"""Signals at every moment, in every launch form: exit code 75 and an identical result."""

import json
import random
import signal
import subprocess
import sys

import pytest
from support.run_commands import HARD

from scripts.compare_runs import differences
from scripts.signal_window import trial

FRAGILE = [
    *HARD, "task._target_=mine.task.Fragile", "+tracker.signals._target_=mine.tracker.Signals",
]  # fmt: skip
STUCK = [
    "data._target_=mine.data.Stuck", "sample.shape=[4,4]", "sample.classes=3",
    "model._target_=mine.nets.Net", "~model.classes", "~model.input_shape", "++model.width=4",
    "trainer.max_epochs=3", "trainer.global_batch_size=12", "launch.threads=1",
    "trainer.data_workers=1", "checkpoint.every_steps=2",
]  # fmt: skip
FORMS = {"single": 1, "launcher": 2, "torchrun": 2}
MOMENTS = ("SIGNAL_IN_BUILD", "SIGNAL_IN_STEP", "SIGNAL_IN_EVALUATION", "SIGNAL_IN_SAVE")


def launched(form: str, *arguments: str) -> tuple[str, list[str]]:
    """Return the module and arguments of a launch form."""
    if form != "torchrun":
        return "trainer.run", [*arguments, f"launch.nproc={FORMS[form]}"]
    agent = ["--standalone", "--nproc-per-node=2", "--max-restarts=2",
             "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"]  # fmt: skip
    return "torch.distributed.run", [*agent, "-m", "trainer.run", *arguments]


def code_of(command, done) -> int:
    """Return the exit code in the outcome file, which must agree with the process's."""
    code = int((command.folder / "outcome").read_text())
    assert done.returncode in (code, 0)  # torchrun has its own codes
    return code


def run(command, form, *arguments, **env):
    module, started = launched(form, *arguments)
    outcome = str(command.folder / "outcome")
    done = command(*started, module=module, PERDURE_OUTCOME=outcome, **env)
    assert "Traceback" not in done.stderr, done.stderr
    return code_of(command, done), done


def record(command, name, number):
    return json.loads((command.folder / f"runs/{name}/attempts/{number:04d}.json").read_text())


def same(command, one, other):
    runs = command.folder / "runs"
    return differences(str(runs / one), str(runs / other)) == []


@pytest.mark.parametrize("name", [
    "SIGTERM", *(pytest.param(other, marks=pytest.mark.slow)
                 for other in ("SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP")),
])  # fmt: skip
def test_signal_saves_and_exits_with_75(command, name):
    code, done = run(command, "single", *FRAGILE, "name=a", SIGNAL_IN_STEP=name)
    assert code == done.returncode == 75
    assert f"Stopped by {name} at step 9; newest checkpoint: step 9." in done.stdout
    assert record(command, "a", 1)["reason"] == name


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "count"), [(1, 12), (2, 8)])
def test_signal_at_random_moments_since_the_first_line_exits_with_75(tmp_path, ranks, count):
    moments = random.Random(ranks)
    for number in range(count):
        after_s, name = moments.uniform(0, 6), moments.choice(["SIGTERM", "SIGUSR1", "SIGUSR2"])
        arguments = [f"name=r{number}", f"launch.nproc={ranks}"]
        done = trial(tmp_path, after_s, name, *arguments, since_handlers=True)
        assert done.is_right, done
        assert "Traceback" not in done.output


@pytest.mark.slow
@pytest.mark.parametrize(("form", "moments"), [
    ("single", MOMENTS), ("launcher", MOMENTS[::2]), ("torchrun", MOMENTS[1::2]),
])  # fmt: skip
def test_signal_at_any_moment_leaves_the_result_unchanged(command, form, moments):
    assert run(command, form, *FRAGILE, "name=full")[0] == 0
    for number, moment in enumerate(moments):
        name = ("SIGTERM", "SIGUSR2")[number % 2]
        code, done = run(command, form, *FRAGILE, f"name={moment}", **{moment: name})
        assert code == 75, (moment, done.stdout, done.stderr)
        stopped = record(command, moment, 1)
        assert (stopped["outcome"], stopped["reason"]) == ("preempted", name), moment
        if moment == "SIGNAL_IN_BUILD":
            assert stopped["last_step"] == 0
        assert run(command, form, *FRAGILE, f"name={moment}")[0] == 0
        assert same(command, "full", moment), moment


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_signal_while_waiting_for_data_stops_the_run(command, wait_for, form):
    assert run(command, form, *STUCK, "name=full")[0] == 0
    module, started = launched(form, *STUCK, "name=a")
    outcome = str(command.folder / "outcome")
    process = command.start(*started, module=module, STUCK_AFTER="40", PERDURE_OUTCOME=outcome)
    wait_for((command.folder / "stuck").exists, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)  # the file is never removed
    assert (command.folder / "outcome").read_text() == "75", (out, err)
    assert form == "torchrun" or "Traceback" not in err  # torchrun shows its own
    assert (command.folder / "stuck").exists()
    assert record(command, "a", 1)["outcome"] == "preempted"
    (command.folder / "stuck").unlink()
    assert run(command, form, *STUCK, "name=a")[0] == 0
    assert same(command, "full", "a")


@pytest.mark.slow
def test_random_samples_do_not_depend_on_the_number_of_workers(command):
    for workers in (0, 1, 2):
        code, _ = run(command, "single", *STUCK, f"trainer.data_workers={workers}",
                      f"name=w{workers}")  # fmt: skip
        assert code == 0
    assert same(command, "w0", "w1")
    assert same(command, "w0", "w2")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["launcher", "torchrun"])
def test_killed_rank_restarts_with_identical_results(command, form):
    assert run(command, form, *FRAGILE, "name=full")[0] == 0
    module, started = launched(form, *FRAGILE, "name=a")
    if form == "launcher":
        started.append("launch.max_restarts=1")
    done = command(*started, module=module, DIE_AT="1:13")
    assert done.returncode == 0, done.stderr
    assert record(command, "a", 2)["elastic_restart"] == "1"
    assert record(command, "a", 2)["outcome"] == "done"
    assert same(command, "full", "a")


def test_killed_rank_without_restarts_exits_with_75(command):
    done = command(*FRAGILE, "name=a", "launch.nproc=2", DIE_AT="1:3")
    assert done.returncode == 75
    assert "rank 1 (process" in done.stderr
    assert "was killed by SIGKILL" in done.stderr


@pytest.mark.slow
def test_rank_that_crashes_in_native_code_exits_with_1(command):
    code, done = run(command, "launcher", *FRAGILE, "name=a", DIE_AT="1:3", DIE_BY="SIGABRT")
    assert code == done.returncode == 1
    assert "rank 1 (process" in done.stderr
    assert "crashed with SIGABRT" in done.stderr


@pytest.mark.slow
def test_crash_loop_exits_with_76(command):
    arguments = [*FRAGILE, "name=a", "checkpoint.every_steps=null"]
    for _ in range(3):
        assert command(*arguments, FAIL_AT="0:2").returncode == 1
    rejected = command(*arguments)
    assert rejected.returncode == 76
    assert "the last 3 attempts of runs/a crashed before saving a checkpoint" in rejected.stderr
    assert "launch.forgive=true" in rejected.stderr
    assert rejected.stderr.count("ZeroDivisionError: a bug in the user's own code") == 3
    assert "Traceback" not in rejected.stderr
    assert not (command.folder / "runs/a/attempts/0004.json").exists()
    again = [*arguments, "launch.forgive=true"]
    assert command(*again, FAIL_AT="0:2").returncode == 1
    assert command(*arguments).returncode == 0  # the earlier failures were forgiven


@pytest.mark.slow
def test_stalled_rank_is_named_and_exits_with_75(command):
    done = command(*FRAGILE, "name=a", "launch.nproc=2", "launch.watchdog_s=15", PAUSE_AT="1:13")
    assert done.returncode == 75, done.stderr
    assert "no step for 15 s (launch.watchdog_s). Behind: rank 1 (process" in done.stderr
    assert "task.py" in done.stderr
    stacks = sorted((command.folder / "runs/a/stacks").iterdir())
    assert [path.name for path in stacks] == [f"attempt-0001-rank-{rank}.txt" for rank in (0, 1)]
    assert "task.py" in stacks[1].read_text()
    (command.folder / "paused").unlink()
    assert command(*FRAGILE, "name=a", "launch.nproc=2").returncode == 0


@pytest.mark.slow
def test_max_time_exits_with_75(command):
    stopped = command(*FRAGILE, "name=a", "trainer.max_epochs=4000", "trainer.max_time=30")
    assert stopped.returncode == 75
    assert "Stopped by deadline at step" in stopped.stdout


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_max_time_before_the_first_step_is_a_config_error(command, ranks):
    rejected = command(*FRAGILE, "name=a", "trainer.max_time=0.001", f"launch.nproc={ranks}")
    assert rejected.returncode == 2
    assert "max_time=0.001 ended before the first step" in rejected.stderr
    assert "Traceback" not in rejected.stderr


@pytest.mark.slow
def test_save_longer_than_the_grace_time_is_not_started(command):
    arguments = [*FRAGILE, "name=a", "preemption.grace_s=1.0"]
    code, done = run(command, "single", *arguments, SIGNAL_IN_STEP="SIGTERM", STEP_S="0.1")
    assert code == 75
    assert "is not saved:" in done.stdout
    assert "newest checkpoint: step 5" in done.stdout


def losses(command, name):
    lines = (command.folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    return [(line["step"], line["loss"]) for line in parsed if line["split"] == "train"]


@pytest.mark.slow
def test_number_of_ranks_changes_neither_samples_nor_losses(command):
    plain = [
        "data=synthetic", "sample.shape=[1,8,8]", "data.train_samples=240", "model=mlp",
        "trainer.global_batch_size=12", "trainer.log_every_steps=1", "launch.threads=1",
        "trainer.max_epochs=2", "optimizer=sgd",
    ]  # fmt: skip
    assert command(*plain, "name=one").returncode == 0
    for ranks, upto in ((4, 13), (2, 26), (3, 40)):
        last = command(*plain, "name=many", f"launch.nproc={ranks}", f"trainer.max_steps={upto}")
        assert last.returncode == 0, last.stderr
    one, many = (losses(command, name) for name in ("one", "many"))
    assert [step for step, _ in one] == [step for step, _ in many] == list(range(1, 41))
    for (_, expected), (_, loss) in zip(one, many, strict=True):
        assert loss == pytest.approx(expected, rel=1e-4)


def test_indivisible_batch_size_is_rejected_with_valid_sizes(command):
    done = subprocess.run(
        [sys.executable, "-m", "trainer.run", *HARD, "name=a", "launch.nproc=5", "--check"],
        cwd=command.folder, env=command.env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "12 samples cannot be divided over 5 ranks" in done.stderr
    assert "nearest" in done.stderr
