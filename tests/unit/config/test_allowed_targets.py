"""Targets that a checkpoint's configuration may call, and targets that are rejected."""

import os
import sys

import pytest

from trainer.config.allowed_targets import reject_targets
from trainer.errors import ConfigError

HOSTILE = [
    "os.system",
    "builtins.eval",
    "subprocess.run",
    "torch.load",
    "torch.hub.load",
    "trainer.run.main",
    "trainer.run.os.system",
    "trainer.data.text.os.system",
    "trainer.data.tokenizer.importlib.import_module",
    "trainer.task.F.torch.hub.load",
    "models.cnn.torch.hub.load",
    "torch.nn.modules.module.warnings.warn",
    "torch.nnx.Linear",
    "modelsx.Net",
    "trainer.database.Evil",
]


@pytest.mark.parametrize("target", HOSTILE)
@pytest.mark.parametrize("wrap", [
    lambda node: {"model": node},
    lambda node: {"model": {"_target_": "torch.nn.Sequential", "_args_": [node]}},
    lambda node: {"data": {"_target_": "trainer.data.digits.Digits", "a": {"b": [{"c": node}]}}},
], ids=["plain", "listed", "deep"])  # fmt: skip
def test_reject_targets_names_external_target_and_allow_option(target, wrap):
    nodes = wrap({"_target_": target, "command": "true"})
    with pytest.raises(ConfigError) as caught:
        reject_targets(nodes)
    assert f"_target_: {target}" in str(caught.value)
    assert f"allow={target}" in str(caught.value)


@pytest.mark.parametrize("target", [
    "models.cnn.CNN", "models.mlp.MLP", "torch.nn.Linear", "torch.nn.modules.linear.Linear",
    "trainer.data.digits.Digits", "trainer.task.Classification", "trainer.data.mnist.Mnist",
])  # fmt: skip
def test_reject_targets_accepts_project_and_torch_nn(target):
    reject_targets({"model": {"_target_": target}})


@pytest.mark.parametrize("target", [
    "trainer.data.tokenizer._package", "trainer.data.feed._Prefetcher",
    "torch.nn.modules.module._addindent",
])  # fmt: skip
def test_reject_targets_rejects_private_names_unless_allowed(target):
    with pytest.raises(ConfigError, match=f"allow={target}"):
        reject_targets({"data": {"_target_": target}})
    reject_targets({"data": {"_target_": target}}, [target])


def test_reject_targets_does_not_import_external_modules(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("import os\nos.environ['EVIL'] = 'yes'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"evil\.Net"):
        reject_targets({"model": {"_target_": "evil.Net"}})
    assert "evil" not in sys.modules
    assert "EVIL" not in os.environ


@pytest.mark.parametrize("allowed", [["mine"], ["mine.net"], ["mine.net.Net"]])
def test_reject_targets_accepts_allowed_packages_and_names(tmp_path, monkeypatch, allowed):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/net.py").write_text("class Net: pass\nfrom os import system\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("mine", "mine.net"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    reject_targets({"model": {"_target_": "mine.net.Net"}}, allowed)
    with pytest.raises(ConfigError, match=r"mine\.net\.system"):
        reject_targets({"model": {"_target_": "mine.net.system"}}, allowed)


def test_reject_targets_accepts_any_fully_qualified_allowed_name():
    reject_targets({"model": {"_target_": "collections.abc.Mapping"}}, ["collections.abc.Mapping"])
