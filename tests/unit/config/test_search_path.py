"""Groups from every source of Hydra's search path are accepted, and their typos are reported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from trainer.config import overrides
from trainer.config.compose import compose_node, conf_folder
from trainer.config.search_path import search_path

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with groups, which is also in a package on Python's path."""
    package = tmp_path / "packages/groups_of_mine"
    for name in ("model/mine.yaml", "extra/one.yaml"):
        path = package / "conf" / name
        path.parent.mkdir(parents=True)
        path.write_text("# @package _global_\nseed: 77\n" if "extra" in name else "{}\n")
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(package.parent)
    return package / "conf"


def arguments(kind, folder, tmp_path):
    if kind == "primary configuration":
        text = json.dumps({"hydra": {"searchpath": [f"file://{folder}"]}})
        (tmp_path / "own.yaml").write_text(text)
        return [f"--config-dir={tmp_path}", "--config-name", "own"]
    return {
        "flag": [f"--config-dir={folder}"],
        "flag and value": ["--config-dir", str(folder)],
        "file": [f"hydra.searchpath=[file://{folder}]"],
        "path": [f"hydra.searchpath=['{folder}']"],
        "package": ["hydra.searchpath=[pkg://groups_of_mine.conf]"],
        "several": [f"hydra.searchpath=[pkg://nothing,file:///nowhere,file://{folder}]"],
    }[kind]


@pytest.mark.parametrize("kind", [
    "flag", "flag and value", "file", "path", "package", "several", "primary configuration",
])  # fmt: skip
def test_groups_are_found_and_typos_reported(kind, folder, tmp_path):
    more = arguments(kind, folder, tmp_path)
    prepared = overrides.prepare([*more, "model=mine", "+extra=one"], conf_folder())
    assert prepared.problems == []
    assert prepared.arguments[-2:] == ["model=mine", "+extra=one"]  # choices, not values
    (problem,) = overrides.prepare([*more, "model=mines"], conf_folder()).problems
    assert "did you mean 'mine'" in problem.text
    assert "groups_of_mine" not in sys.modules


@pytest.mark.parametrize("value", ["[file://", "7", "{a: b}", "[structured://x, '']", "null"])
def test_unusable_search_paths_are_left_to_hydra(value):
    assert search_path([f"hydra.searchpath={value}"]) == []


def test_groups_of_a_plugin_are_composed(folder, monkeypatch):
    class Groups(SearchPathPlugin):
        def manipulate_search_path(self, search_path):
            search_path.append("mine", f"file://{folder}")

    plugins = Plugins.instance()
    before = dict(plugins.plugin_type_to_subclass_list)
    plugins.register(Groups)
    try:
        node, problems = compose_node(["+extra=one", "model=mine"], "")
    finally:
        plugins.plugin_type_to_subclass_list.clear()
        plugins.plugin_type_to_subclass_list.update(before)
        plugins.class_name_to_class.pop(f"{Groups.__module__}.{Groups.__qualname__}", None)
    assert problems == []
    assert node.seed == 77


def test_run_accepts_a_search_path(folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "trainer.run", f"hydra.searchpath=[file://{folder}]", "+extra=one",
         "--cfg", "job"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "seed: 77" in done.stdout
