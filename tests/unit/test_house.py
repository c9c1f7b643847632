"""Configuration files compose, imports have no side effects, public names have docstrings."""

import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from trainer import checkpoint
from trainer.config.compose import conf_folder
from trainer.config.merge import merge
from trainer.config.redact import stored
from trainer.config.schema import Run, Sample
from trainer.training import build

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
YAMLS = sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml"))
CHOICES = [path.removesuffix(".yaml") for path in YAMLS if "/" in path]
SOURCES = sorted(path for folder in ("trainer", "models") for path in (ROOT / folder).rglob("*.py"))
HEAVY = (
    "wandb", "tensorboard", "torchmetrics", "sklearn", "scipy", "s3fs", "obstore", "botocore",
    "onnx", "matplotlib", "rich", "PIL", "datasets", "pandas", "torchdata",
)  # fmt: skip


# --- configuration -----------------------------------------------------------------------------


def composed(*overrides):
    """Compose as trainer/run.py does."""
    ConfigStore.instance().store(
        name="schema", node=OmegaConf.to_container(OmegaConf.structured(Run))
    )
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        node = compose("config", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(node)  # for ${hydra:…}
    OmegaConf.set_struct(node, False)
    del node["hydra"]
    return node


@pytest.fixture(autouse=True)
def _restore_hydra():
    yield
    HydraConfig.instance().cfg = None


def test_conf_folder_contains_the_default_configuration():
    assert {"config.yaml", "model/cnn.yaml", "experiment/digits_cnn.yaml"} <= set(YAMLS)
    assert conf_folder() == CONF


@pytest.mark.parametrize("choice", CHOICES)
def test_conf_every_choice_composes_without_problems(choice, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")  # tests have no login
    group, _, name = choice.rpartition("/")
    run, problems = merge(composed(f"{group}={name}"))
    assert problems == []
    assert build.check(run) == []


def test_default_configuration_trains_a_cnn_on_digits():
    run, problems = merge(composed())
    assert (problems, build.check(run)) == ([], [])
    assert (run.name, run.run_dir) == ("digits-cnn", "runs/digits-cnn")
    assert run.sample == Sample(shape=[1, 8, 8], classes=10)
    assert run.model["input_shape"] == [1, 8, 8]


def test_default_name_joins_data_and_model():
    assert merge(composed("data=mnist", "model=mlp"))[0].name == "mnist-mlp"


def test_experiment_sets_its_name():
    for choice in CHOICES:
        group, _, name = choice.rpartition("/")
        if group == "experiment":
            assert merge(composed(f"experiment={name}"))[0].name == name


def test_stored_default_configuration_is_json_without_interpolations():
    config = stored(composed())
    assert "${" not in json.dumps(config)
    assert config["run_dir"] == "runs/digits-cnn"


def restated(cls, node, prefix):
    """Yield the keys of `node` whose value is the dataclass's own default."""
    for field in dataclasses.fields(cls):
        if field.name not in node:
            continue
        default = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        value = node[field.name]
        if dataclasses.is_dataclass(default) and isinstance(value, dict):
            yield from restated(type(default), value, f"{prefix}{field.name}.")
        elif value == default:
            yield prefix + field.name


@pytest.mark.parametrize("path", YAMLS)
def test_conf_file_does_not_restate_a_default(path):
    text = (CONF / path).read_text()
    node = OmegaConf.to_container(OmegaConf.create(text))
    group = path.partition("/")[0]
    fields = {field.name: field for field in dataclasses.fields(Run)}
    schema = fields[group].default_factory if group in fields else None
    if "@package _global_" in text or "/" not in path:
        keys = list(restated(Run, node, ""))
    elif dataclasses.is_dataclass(schema):
        keys = list(restated(schema, node, f"{group}."))
    else:
        keys = []  # an open group has no defaults
    assert keys == []


def test_restated_lists_keys_equal_to_their_defaults():
    node = {"seed": 0, "name": "x", "trainer": {"accumulate": 1, "max_epochs": 3}, "sample": {}}
    assert list(restated(Run, node, "")) == ["seed", "trainer.accumulate"]


def test_conf_files_have_fewer_than_450_lines():
    assert sum(len((CONF / path).read_text().splitlines()) for path in YAMLS) < 450


def test_schema_every_setting_has_a_doc_sentence():
    def check(cls):
        for field in dataclasses.fields(cls):
            assert field.metadata["doc"].endswith("."), f"{cls.__name__}.{field.name}"
            if dataclasses.is_dataclass(field.default_factory):
                check(field.default_factory)

    check(Run)


# --- imports -----------------------------------------------------------------------------------

IMPORT_ALL = """
import importlib, json, os, signal, sys, threading
import torch, omegaconf  # their side effects are not checked
def handlers():
    return [str(signal.getsignal(number)) for number in signal.Signals]
before = dict(os.environ), threading.active_count(), sys.argv[:], handlers()
for name in MODULES:
    importlib.import_module(name)
print(json.dumps({
    "heavy": [name for name in HEAVY if name in sys.modules],
    "environment": dict(os.environ) == before[0],
    "threads": threading.active_count() - before[1],
    "arguments": sys.argv == before[2],
    "handlers": handlers() == before[3],
    "groups": torch.distributed.is_initialized(),
}))
"""


def modules():
    names = [path.relative_to(ROOT).with_suffix("").as_posix() for path in SOURCES]
    return [name.replace("/", ".").removesuffix(".__init__") for name in names]


def test_import_of_every_module_is_light_and_has_no_side_effects(tmp_path):
    script = f"MODULES = {modules()!r}\nHEAVY = {HEAVY!r}\n{IMPORT_ALL}"
    done = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", script],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    effects = json.loads(done.stdout)  # and nothing else was printed
    assert done.stderr == ""
    assert effects == {
        "heavy": [], "environment": True, "threads": 0, "arguments": True,
        "handlers": True, "groups": False,
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []


# --- docstrings --------------------------------------------------------------------------------


def public(tree, prefix=""):
    """Yield (name, node) of every public class and function, and of public methods."""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module_and_its_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text())
    bare = [name for name, node in public(tree) if not ast.get_docstring(node)]
    assert bare == []
    assert ast.get_docstring(tree)


def test_checkpoint_package_exports_its_documented_names():
    assert sorted(checkpoint.__all__) == [
        "Attempt", "Commit", "Content", "DamagedError", "Manifest", "PendingSave", "Reader",
        "Writer", "delete", "latest", "load", "save", "steps", "verify",
    ]  # fmt: skip
    assert all(hasattr(checkpoint, name) for name in checkpoint.__all__)
