"""python -m trainer lists the commands."""

import importlib.util
import re

import pytest

from trainer import __main__ as listing


def test_listing_names_only_existing_commands(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["trainer"])
    assert listing.main() == 0
    names = re.findall(r"python -m (trainer\.\w+)", capsys.readouterr().out)
    assert len(names) == len(set(names)) >= 8
    for name in names:
        assert importlib.util.find_spec(name) is not None, name


@pytest.mark.parametrize(("typed", "hint"), [("exprt", "did you mean 'export'?"), ("xyz", "valid")])
def test_listing_unknown_command_suggests_the_closest(monkeypatch, capsys, typed, hint):
    monkeypatch.setattr("sys.argv", ["trainer", typed])
    assert listing.main() == 2
    assert hint in capsys.readouterr().err
