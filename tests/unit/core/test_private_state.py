"""Private files of a user: what others could have written is never read."""

import os
import pwd
import stat

import pytest

from trainer.core import private_state
from trainer.core.private_state import append_line, read_lines, state_folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A separate state home; its folder does not exist yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home/state"))
    return tmp_path / "home/state"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o000, 0o077])
def test_append_line_creates_a_private_folder_and_file(home, umask):
    before = os.umask(umask)
    try:
        for line in ("a", "b", "a"):
            append_line("names", line)
    finally:
        os.umask(before)
    assert read_lines("names") == ["a", "b"]
    assert (mode(home / "perdure"), mode(home / "perdure/names")) == (0o700, 0o600)


@pytest.mark.parametrize("value", ["", "relative/state"])
def test_state_folder_without_an_absolute_state_home_is_below_home(monkeypatch, tmp_path, value):
    monkeypatch.setenv("XDG_STATE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_folder() == tmp_path / ".local/state/perdure"


def test_user_without_a_home_has_no_state_folder(monkeypatch, tmp_path):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        append_line("names", "a")
    assert list(tmp_path.iterdir()) == []


def test_append_line_drops_the_older_half_of_a_large_file(home, monkeypatch):
    monkeypatch.setattr(private_state, "MAX_BYTES", 100)
    lines = [f"line-{index:04d}" for index in range(200)]
    for line in lines:
        append_line("names", line)
        assert (home / "perdure/names").stat().st_size <= 100
        assert line in read_lines("names")
    newest = read_lines("names")
    assert newest == lines[-len(newest) :]
    assert len(newest) >= 5


def attack_rights_of_folder(folder):
    folder.chmod(0o750)


def attack_world_writable_folder(folder):
    folder.chmod(0o777)


def attack_rights_of_file(folder):
    (folder / "names").chmod(0o640)


def attack_linked_folder(folder):
    elsewhere = folder.with_name("elsewhere")
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


def attack_linked_file(folder):
    (folder / "names").rename(folder / "others")
    (folder / "names").symlink_to("others")


def attack_fifo(folder):
    (folder / "names").unlink()
    os.mkfifo(folder / "names", 0o600)


def attack_folder_in_place_of_the_file(folder):
    (folder / "names").unlink()
    (folder / "names").mkdir(0o700)


def attack_owner_of_folder(folder):
    os.chown(folder, 12345, -1)


def attack_owner_of_file(folder):
    os.chown(folder / "names", 12345, -1)


ATTACKS = [value for name, value in sorted(globals().items()) if name.startswith("attack_")]
AS_ROOT = (attack_owner_of_file, attack_owner_of_folder)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_files_that_are_not_private_are_neither_read_nor_written(home, attack):
    if attack in AS_ROOT and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    append_line("names", "a")
    attack(home / "perdure")
    before = {path: path.stat().st_size for path in home.rglob("*")}
    with pytest.raises(OSError):
        read_lines("names")
    with pytest.raises(OSError):
        append_line("names", "b")
    assert {path: path.stat().st_size for path in home.rglob("*")} == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_root_creates_no_folder_in_the_home_of_another_user(home):
    home.parent.mkdir()
    os.chown(home.parent, 12345, -1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        append_line("names", "a")
    assert list(home.parent.iterdir()) == []


def test_append_line_below_a_file_raises_os_error(home):
    home.parent.touch()
    with pytest.raises(OSError):
        append_line("names", "a")
