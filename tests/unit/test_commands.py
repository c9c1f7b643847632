"""python -m trainer lists what there is."""

import importlib.util
import re

import pytest

from trainer import __main__ as listing


def test_every_command_that_it_lists_is_there(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["trainer"])
    assert listing.main() == 0
    names = re.findall(r"python -m (trainer\.\w+)", capsys.readouterr().out)
    assert len(names) == len(set(names)) >= 8
    for name in names:
        found = importlib.util.find_spec(name)
        assert found is not None, name


@pytest.mark.parametrize(("typed", "hint"), [("exprt", "did you mean 'export'?"), ("xyz", "valid")])
def test_what_it_does_not_know_gets_the_nearest(monkeypatch, capsys, typed, hint):
    monkeypatch.setattr("sys.argv", ["trainer", typed])
    assert listing.main() == 2
    assert hint in capsys.readouterr().err
