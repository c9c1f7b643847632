"""The memory of a user's own runs: by location and configuration."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.checkpoint.values import decode, encode
from trainer.config import own_runs
from trainer.config.schema import ObjectStore
from trainer.core.nested import leaves

HERE = ObjectStore()
CONFIG = {
    "name": "a",
    "model": {"_target_": "mine.nets.Net", "width": 3, "layers": [1, 2]},
    "data": {"_target_": "mine.data.Points", "path": "${oc.env:HOME}/x"},
    "checkpoint": {"metric": None, "every_s": 600.0},
}


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state/perdure"


def test_is_own_accepts_other_spellings_of_the_same_place(tmp_path, monkeypatch):
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "link").symlink_to("runs")
    monkeypatch.chdir(tmp_path)
    own_runs.record(["runs/a", "s3://lab/mirror"], CONFIG, HERE)
    for url in ("runs/a", "./runs/a", "link/a", f"{tmp_path}/runs/a", "runs/b/../a"):
        assert own_runs.is_own(url, CONFIG, HERE), url
    assert own_runs.is_own("s3://lab/mirror", CONFIG, HERE)


@pytest.mark.parametrize("url", ["runs/b", "copy/a", "s3://lab/b", "s3://other/a", "/s3:/lab/a"])
def test_is_own_rejects_other_places(url):
    own_runs.record(["runs/a", "s3://lab/a"], CONFIG, HERE)
    assert not own_runs.is_own(url, CONFIG, HERE)


def test_is_own_rejects_the_bucket_of_another_server(monkeypatch):
    own_runs.record(["s3://lab/a"], CONFIG, ObjectStore(endpoint_url="https://one"))
    assert own_runs.is_own("s3://lab/a", CONFIG, ObjectStore(endpoint_url="https://one"))
    assert not own_runs.is_own("s3://lab/a", CONFIG, ObjectStore(endpoint_url="https://two"))
    assert not own_runs.is_own("s3://lab/a", CONFIG, HERE)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://one")
    assert own_runs.is_own("s3://lab/a", CONFIG, HERE)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://two")  # of more weight
    assert not own_runs.is_own("s3://lab/a", CONFIG, HERE)


@pytest.mark.parametrize("path", [path for path, _ in leaves(CONFIG)], ids=str)
def test_is_own_rejects_every_changed_value(path):
    own_runs.record(["runs/a"], CONFIG, HERE)
    for value in ("os.system", {"_target_": "os.system"}, [], 0):
        changed = copy.deepcopy(CONFIG)
        node = changed
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        assert not own_runs.is_own("runs/a", changed, HERE)


def test_is_own_rejects_added_and_removed_keys():
    own_runs.record(["runs/a"], CONFIG, HERE)
    assert not own_runs.is_own("runs/a", {**CONFIG, "task": {"_target_": "os.system"}}, HERE)
    assert not own_runs.is_own("runs/a", {k: v for k, v in CONFIG.items() if k != "data"}, HERE)
    assert not own_runs.is_own("runs/a", {}, HERE)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_configuration_read_from_a_manifest_is_recognized(config):
    own_runs.record(["runs/a"], config, HERE)
    read = decode(json.loads(json.dumps(encode(config, "config"))))  # as a manifest does
    assert own_runs.is_own("runs/a", read, HERE)
    shuffled = dict(reversed(list(read.items())))
    assert own_runs.is_own("runs/a", shuffled, HERE)


def test_memory_holds_digests_only_and_each_once(state):
    for _ in range(3):
        own_runs.record(["runs/a", "runs/b"], CONFIG, HERE)
    text = (state / "runs").read_text()
    assert len(text.splitlines()) == 2
    assert all(len(line) == 64 and int(line, 16) >= 0 for line in text.splitlines())


def test_memory_that_cannot_be_private_trusts_nothing_and_raises_nothing(state, monkeypatch):
    own_runs.record(["runs/a"], CONFIG, HERE)
    state.chmod(0o755)
    assert not own_runs.is_own("runs/a", CONFIG, HERE)
    own_runs.record(["runs/b"], CONFIG, HERE)
    state.chmod(0o700)
    assert own_runs.is_own("runs/a", CONFIG, HERE)
    assert not own_runs.is_own("runs/b", CONFIG, HERE)
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nothing")
    own_runs.record(["runs/a"], CONFIG, HERE)
    assert not own_runs.is_own("runs/a", CONFIG, HERE)
