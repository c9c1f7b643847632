"""Stop signals before the training loop: exit code 75 and the outcome file."""

import os
import signal
import subprocess
import sys

import pytest

WAITS = """
import os, sys, time
from trainer.cluster.early_stop import NAMES, early_stop
early_stop.record()
print("recording", flush=True)
if sys.argv[1] == "composing":
    sys.stdin.readline()
early_stop.answer(sys.argv[2].split(","))
print("answering", flush=True)
{wait}
print("ended", flush=True)
"""
SLEEP = "time.sleep(60)"
STORE = """
from datetime import timedelta
from torch.distributed import TCPStore
print("waiting", flush=True)
TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=60))  # a call that runs no Python handlers
"""
ALL = "SIGTERM,SIGUSR1,SIGUSR2,SIGINT,SIGHUP"


@pytest.fixture
def start(tmp_path):
    started = []

    def start(phase, names=ALL, wait=SLEEP, **env):
        process = subprocess.Popen(
            [sys.executable, "-c", WAITS.format(wait=wait), phase, names],
            env={**os.environ, "PERDURE_OUTCOME": str(tmp_path / "outcome"), **env},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "recording\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(60)
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def outcome(tmp_path):
    path = tmp_path / "outcome"
    return path.read_text() if path.exists() else None


@pytest.mark.parametrize("name", ALL.split(","))
def test_signal_before_the_configuration_is_known_is_answered_with_75(start, tmp_path, name):
    process = start("composing")
    process.send_signal(getattr(signal, name))
    process.send_signal(signal.SIGTERM)  # further signals change nothing
    out, err = process.communicate("go\n", timeout=60)
    assert (process.returncode, outcome(tmp_path), out) == (75, "75", "")
    assert f"Stopped by {name}" in err


@pytest.mark.parametrize("name", ALL.split(","))
def test_signal_after_that_ends_the_process_at_once(start, tmp_path, name):
    process = start("answering")
    assert process.stdout.readline() == "answering\n"
    process.send_signal(getattr(signal, name))
    assert process.wait(30) == 75
    assert outcome(tmp_path) == "75"


def test_signal_ends_a_process_that_waits_in_a_c_call(start, tmp_path):
    process = start("answering", wait=STORE)
    assert [process.stdout.readline() for _ in range(2)] == ["answering\n", "waiting\n"]
    process.send_signal(signal.SIGUSR2)
    assert process.wait(30) == 75
    assert outcome(tmp_path) == "75"


@pytest.mark.parametrize("phase", ["composing", "answering"])
def test_signal_that_is_not_configured_has_its_default_action(start, tmp_path, phase):
    process = start(phase, "SIGTERM")
    if phase == "answering":
        assert process.stdout.readline() == "answering\n"
    process.send_signal(signal.SIGUSR1)
    process.stdin.write("go\n")
    process.stdin.close()
    assert process.wait(30) == -signal.SIGUSR1
    assert outcome(tmp_path) is None


def test_nohup_keeps_sighup_ignored(start):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as under nohup
    try:
        process = start("answering", wait="sys.stdin.readline()")
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert process.stdout.readline() == "answering\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate("go\n", timeout=30)[0] == "ended\n"
    assert process.returncode == 0


@pytest.mark.parametrize(("adopts", "code"), [(False, 75), (True, 0)])
def test_rank_has_time_to_join_the_others(start, adopts, code):
    adopt = "early_stop.adopt(); print('adopted', flush=True); sys.stdin.readline()"
    wait = f"time.sleep(1); {adopt}" if adopts else SLEEP
    process = start("answering", wait=wait, RANK="0", WORLD_SIZE="2")
    assert process.stdout.readline() == "answering\n"
    process.send_signal(signal.SIGTERM)
    if adopts:
        assert process.stdout.readline() == "adopted\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(6)
        process.communicate("go\n", timeout=30)
    assert process.wait(30) == code


def test_rank_of_an_agent_exits_with_0(start, tmp_path):
    process = start("answering", TORCHELASTIC_RUN_ID="x")
    assert process.stdout.readline() == "answering\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0  # an agent would restart it
    assert outcome(tmp_path) == "75"


@pytest.mark.parametrize(("age_s", "expected"), [(0, "1"), (60, "75")])
def test_outcome_of_a_failed_rank_is_kept_and_an_old_one_is_replaced(
    start, tmp_path, age_s, expected
):
    process = start("answering")
    assert process.stdout.readline() == "answering\n"
    (tmp_path / "outcome").write_text("1")
    if age_s:
        os.utime(tmp_path / "outcome", (1000, 1000))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert outcome(tmp_path) == expected


def test_forked_child_has_the_default_actions(start):
    child = "os.fork() or [print(os.getpid(), flush=True), time.sleep(60)]"
    wait = f"{child}; print(os.wait()[1])"
    process = start("answering", wait=wait)
    assert process.stdout.readline() == "answering\n"
    os.kill(int(process.stdout.readline()), signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == f"{int(signal.SIGTERM)}\nended\n"
    assert process.returncode == 0


def test_answer_without_record_changes_nothing():
    from trainer.cluster.early_stop import EarlyStop

    before = signal.getsignal(signal.SIGTERM)
    EarlyStop().answer(["SIGTERM"])
    assert signal.getsignal(signal.SIGTERM) is before
