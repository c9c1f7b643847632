"""The real wandb library: offline files, and training without a server or with a hanging one."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.event_files import wandb_run
from support.wandb_server import WandbServer

from trainer.checkpoint import Content, Writer, lineage
from trainer.cluster.world import World
from trainer.core.state import State
from trainer.errors import ConfigError
from trainer.storage import open_store
from trainer.tracking import code
from trainer.tracking.jsonl import Jsonl
from trainer.tracking.wandb import Wandb

KEY = "a" * 40


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Nothing of this machine's own settings, and nothing that stays."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    yield
    for thread in threading.enumerate():
        if thread.name == "wandb-tracker":
            thread.join()


def aliases(result):
    return [sorted(set(names) - {"latest"}) for _, names, _ in result]


def line(step, split="train", **metrics):
    position = {"step": step, "epoch": 0, "samples": 4 * step, "time": 1.5, "split": split}
    return {**position, **metrics}


def facts(run_dir, **more):
    config = {"name": "a,b", "seed": 3, "checkpoint": {"metric": "accuracy", "mode": "max"}}
    return {
        "run_dir": str(run_dir), "store": open_store(str(run_dir)), "attempt": 1, "step": 0,
        "last_eval_step": 0, "run_id": "20260101-abc", "config": config, **more,
    }  # fmt: skip


def offline_files(folder):
    return sorted(folder.rglob("wandb/offline-run-*/*.wandb"))


def history(path):
    return [
        {key: value for key, value in item.items() if not key.startswith("_")}
        for item in wandb_run(path)[2]
    ]


def attempt(run_dir, number, steps, *, resumed=0, outcome="preempted", **options):
    """Log steps of which every tenth has an evaluation, as an attempt does, and close."""
    time.sleep(1 - time.time() % 1)  # the library names folders by the second
    log, tracker = Jsonl(), Wandb(close_timeout_s=60.0, **options)
    newest = {"step": resumed, "last_eval_step": resumed}
    for writer in (log, tracker):
        writer.start(facts(run_dir, attempt=number, **newest))
    for step in steps:
        for item in [line(step, loss=1 / step)] + [line(step, "eval", loss=2.0)] * (step % 10 == 0):
            log.log(item)
            tracker.log(item)
    tracker.ended(outcome)
    log.close()
    tracker.close()


def positions(rows):
    return [(row["step"], "eval" if "eval/loss" in row else "train") for row in rows]


def every_line(steps):
    return [
        (step, split)
        for step in steps
        for split in ("train", "eval")
        if split == "train" or step % 10 == 0
    ]


def test_wandb_offline_attempts_share_a_run_and_store_each_line_once(tmp_path, capsys):
    hooks = os.sys.exit, os.sys.excepthook
    attempt(tmp_path, 1, range(1, 31), mode="offline", options={"tags": ["x"]})
    attempt(tmp_path, 2, range(21, 41), resumed=20, outcome="done", mode="offline")
    assert (os.sys.exit, os.sys.excepthook) == hooks
    first, second = (wandb_run(path) for path in offline_files(tmp_path))
    assert first[0] == second[0] == "20260101-abc"
    assert second[1]["seed"] == 3
    assert second[1]["attempt"] == 2
    assert (first[3], second[3]) == (1, 0)
    displayed = [history(path) for path in offline_files(tmp_path)]
    assert positions(displayed[0]) == every_line(range(1, 31))
    assert positions(displayed[1]) == every_line(range(31, 41))
    assert displayed[0][0] == {"step": 1, "epoch": 0, "samples": 4, "train/loss": 1.0}
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].count("wandb sync ") == 2
    assert err == ""


@pytest.mark.parametrize("modes", [
    ("online", "offline", "online"),
    ("offline", "synced", "offline", "online"),
    pytest.param(
        ("offline", "killed", "offline", "online", "offline", "synced"), marks=pytest.mark.slow
    ),
    pytest.param(("killed", "online", "killed", "offline", "synced"), marks=pytest.mark.slow),
], ids="-".join)  # fmt: skip
def test_wandb_site_gets_each_line_once_in_every_mode(modes, tmp_path, monkeypatch, capsys):
    """Each attempt resumes 5 steps before the end of the last one; one is killed without an end."""
    resumed, number = 0, 0
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        for mode in modes:
            if mode == "synced":
                sync(capsys.readouterr().out, tmp_path)
                continue
            number += 1
            steps = range(resumed + 1, resumed + 16)
            if mode == "killed":
                killed_attempt(tmp_path, number, steps, resumed)
            else:
                attempt(tmp_path, number, steps, resumed=resumed, mode=mode)
            resumed += 10
    (run,) = server.runs.values()
    assert positions(run["history"]) == every_line(range(1, resumed + 6))
    assert run["summary"]["step"] == resumed + 5


def sync(printed, folder):
    """Run the commands that the last attempt printed."""
    commands = printed.splitlines()[-1].partition("offline data: ")[2]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(
        commands, shell=True, check=True, env=environment, cwd=folder, capture_output=True
    )


def killed_attempt(run_dir, number, steps, resumed):
    """Log some steps offline in another process, which ends by SIGKILL once they are stored."""
    code = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from test_wandb import *
log, tracker = Jsonl(), Wandb(mode="offline")
newest = dict(step={resumed}, last_eval_step={resumed})
for writer in (log, tracker):
    writer.start(facts({str(run_dir)!r}, attempt={number}, **newest))
for step in {steps!r}:
    for item in [line(step, loss=1 / step)] + [line(step, "eval", loss=2.0)] * (step % 10 == 0):
        log.log(item)
        tracker.log(item)
log.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr


def test_wandb_disabled_writes_nothing(tmp_path, capsys):
    tracker = Wandb(mode="disabled")
    tracker.start(facts(tmp_path / "run"))
    tracker.log(line(1, loss=0.5))
    tracker.ended("done")
    tracker.close()
    assert list((tmp_path / "run").iterdir()) == []
    assert capsys.readouterr() == ("", "")


@contextmanager
def server(kind):
    """Yield the address of a server that rejects connections or never responds."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "hangs":
            listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["refuses", "hangs"])
def test_wandb_without_network_stores_the_attempt_offline(kind, tmp_path, monkeypatch, capfd):
    with server(kind) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        tracker = Wandb(init_timeout_s=1.0, close_timeout_s=60.0)
        tracker.start(facts(tmp_path))
        tracker.log(line(1, loss=0.5))
        tracker.ended("done")
        tracker.close()
    (path,) = offline_files(tmp_path)
    assert [item["step"] for item in history(path)] == [1]
    out, err = capfd.readouterr()
    assert err.count("wandb: is offline for this attempt") == 1
    assert f"wandb sync {path.parent}" in out


def test_wandb_close_does_not_wait_for_a_hanging_server(tmp_path, monkeypatch, capsys):
    with server("hangs") as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        tracker = Wandb(init_timeout_s=4.0, close_timeout_s=0.0, queue_lines=2)
        tracker.start(facts(tmp_path))
        worker = tracker._thread
        for step in range(5):
            tracker.log(line(step, loss=0.5))
        tracker.close()
        assert worker.is_alive()
        err = capsys.readouterr().err
        assert err.count("2 lines are pending") == 1
        assert "did not end in 0 s" in err
        worker.join()


@pytest.mark.parametrize(("arguments", "environment", "netrc", "message"), [
    ({}, {}, "", "wandb login"),
    ({}, {}, "machine api.wandb.ai login user password x", ""),
    ({}, {"WANDB_BASE_URL": "https://w.example.org"}, "machine api.wandb.ai login u password x",
     "wandb login"),
    ({}, {"WANDB_API_KEY": KEY}, "", ""),
    ({}, {"WANDB_MODE": "offline"}, "", ""),
    ({"mode": "offline"}, {}, "", ""),
    ({"mode": "ofline"}, {}, "", "did you mean 'offline'"),
    ({"mode": "offline", "artifacts": "file"}, {}, "", "did you mean 'files'"),
])  # fmt: skip
def test_wandb_problem_is_reported_before_the_start(
    arguments, environment, netrc, message, tmp_path, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    text = Wandb.problem(arguments)
    assert message in text
    assert bool(message) == bool(text)
    if message:
        with pytest.raises(ConfigError, match=r"tracker\.wandb"):
            Wandb(**arguments)


@pytest.mark.parametrize("location", ["local", "memory"])
@pytest.mark.parametrize("artifacts", ["manifests", "files"])
def test_wandb_finished_run_logs_artifacts(artifacts, location, tmp_path):
    run_dir = str(tmp_path / "run") if location == "local" else f"memory:/{tmp_path}/run"
    store = open_store(run_dir)
    attempt = lineage.begin(store, {})
    writer = Writer(store, World(), attempt)
    for step, best in ((10, 10), (20, 10)):
        state = State(step=step, metrics={"accuracy": 0.5}, best={"step": best, "value": 0.5})
        content = Content(objects={"run": state.state_dict()})
        writer.start_save(content, step=step).result()
    store.replace("exports/model.safetensors", b"weights")
    tracker = Wandb(mode="offline", artifacts=artifacts)
    tracker.start({**facts(run_dir), "store": store})
    tracker.ended("done")
    tracker.close()
    if location == "memory":  # its files are copied to the run
        (key,) = (key for key in store.list("wandb") if key.endswith(".wandb"))
        path = tmp_path / "copy"
        path.write_bytes(store.read(key))
    else:
        (path,) = offline_files(tmp_path / "run")
    result = wandb_run(path)[4]
    shards = {"manifests": 0, "files": 1}[artifacts]
    assert [name for name, _, _ in result] == ["checkpoint-a-b", "checkpoint-a-b", "exports-a-b"]
    assert aliases(result) == [["best", "step-10"], ["newest", "step-20"], []]
    best, newest, exports = ({file.path for file in files} for _, _, files in result)
    assert (len(best), len(newest), exports) == (1 + shards, 1 + shards, {"model.safetensors"})
    assert "manifest.json" in best & newest


def test_code_version_is_commit_and_dirty_flag(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    assert code.version(str(tmp_path)) == {}
    git("init")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-m", "first")
    (tmp_path / "new.py").write_text("2")
    result = code.version(str(tmp_path))
    assert len(result["commit"]) == 40
    assert result["dirty"] is False
    (tmp_path / "a.py").write_text("3")
    assert code.version(str(tmp_path)) == {**result, "dirty": True}
    assert code.version("/nonexistent") == {}
