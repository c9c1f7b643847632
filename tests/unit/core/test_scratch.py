"""Private temporary folders."""

import os
import signal
import stat
import subprocess
import sys
import tempfile

import pytest

from trainer.core.scratch import scratch_folder, user_folder
from trainer.errors import ConfigError

HOLD = """
import sys
from trainer.core.scratch import scratch_folder
with scratch_folder("held") as folder:
    (folder / "worker.json").write_text("secret")
    print(folder, flush=True)
    sys.stdin.read()
"""

USERS = """
import os, sys
from trainer.core.scratch import scratch_folder, user_folder
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
(user_folder() / "multirun").mkdir(parents=True)
with scratch_folder("a") as folder:
    (folder / "worker.json").write_text("secret")
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def hold(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    return process, process.stdout.readline().strip()


def test_scratch_folder_is_private_and_deleted():
    with scratch_folder("a") as folder:
        assert folder.is_relative_to(user_folder())
        for path in (folder, user_folder()):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert not folder.exists()


def test_next_start_deletes_folders_of_killed_processes_only(tmp_path):
    killed, killed_folder = hold(tmp_path)
    living, living_folder = hold(tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert os.path.exists(killed_folder)
    others = [user_folder() / name for name in ("multirun/.submitit", "logs/a")]
    for folder in others:  # of sweeps and runs, which have no lock
        folder.mkdir(parents=True)
    with scratch_folder("b"):
        assert not os.path.exists(killed_folder)
        assert os.path.exists(living_folder)
        assert all(folder.exists() for folder in others)
    living.communicate("")
    assert not os.path.exists(living_folder)
    for pipe in (killed.stdin, killed.stdout):
        pipe.close()


def test_scratch_folder_of_another_user_is_rejected():
    user_folder().symlink_to("/")
    expectation = pytest.raises(ConfigError, match="belongs to another user; set TMPDIR")
    with expectation, scratch_folder("a"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")
def test_two_users_share_one_folder_for_temporary_files():
    with tempfile.TemporaryDirectory(dir="/tmp") as shared:  # others may enter it, unlike tmp_path
        os.chmod(shared, 0o1777)
        environment = {**os.environ, "TMPDIR": shared}
        for user in ("4001", "4002"):
            subprocess.run([sys.executable, "-c", USERS, user], env=environment, check=True)
        assert sorted(os.listdir(shared)) == ["perdure-4001", "perdure-4002"]
