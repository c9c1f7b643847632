"""Digests of configuration and code: the changes that they detect."""

import sys

import pytest

from tests.support.run_configs import CONFIG, changed
from trainer.training.identity import identity


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "own_code"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "helper.py").write_text("WIDTH = 1\n")
    (folder / "task.py").write_text("from own_code.helper import WIDTH\ndef make(): return WIDTH\n")
    (folder / "unused.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith("own_code")]:
        del sys.modules[name]


CUSTOM = changed(task={"_target_": "own_code.task.make"})


@pytest.mark.parametrize("file", ["task.py", "helper.py", "__init__.py"])
def test_changed_source_of_a_target_or_its_imports_changes_the_code_digest(package, file):
    before = identity(CUSTOM, 1)
    assert identity(CUSTOM, 1) == before
    (package / file).write_text((package / file).read_text() + "# fixed\n")
    after = identity(CUSTOM, 1)
    assert after["code_digest"] != before["code_digest"]
    assert after["config_digest"] == before["config_digest"]


def test_modules_that_nothing_imports_do_not_count(package):
    before = identity(CUSTOM, 1)
    (package / "unused.py").write_text("x = 1\n")
    assert identity(CUSTOM, 1) == before


@pytest.mark.parametrize(("key", "value"), [
    ("optimizer__lr", 0.5), ("task", {"_target_": "trainer.task.Other"}), ("seed", 9),
    ("trainer__log_every_steps", 99),
])  # fmt: skip
def test_any_changed_setting_changes_the_config_digest(key, value):
    before, after = identity(CONFIG, 1), identity(changed(**{key: value}), 1)
    assert after["config_digest"] != before["config_digest"]


def test_settings_of_the_check_itself_do_not_count():
    other = {**CONFIG, "launch": {**CONFIG.get("launch", {}), "forgive": True,
             "max_attempts_without_progress": 9, "max_losses_without_progress": 9}}  # fmt: skip
    assert identity(other, 1) == identity(CONFIG, 1)


def test_number_of_ranks_counts():
    assert identity(CONFIG, 1)["config_digest"] != identity(CONFIG, 2)["config_digest"]
