"""Selection by a path: a run, its checkpoints folder, one checkpoint or a folder of copies."""

import pytest
from support.manifests import commit_manifest, spoil
from support.timelines import start

from trainer.checkpoint import lineage, select
from trainer.errors import CheckpointError
from trainer.storage import open_store


@pytest.fixture(params=["local", "relative", "file", "memory"])
def root(request, tmp_path, monkeypatch) -> str:
    """Path or URL of an empty folder."""
    monkeypatch.chdir(tmp_path)
    forms = {"local": "", "relative": ".", "file": "file://", "memory": "memory:/"}
    return "." if request.param == "relative" else f"{forms[request.param]}{tmp_path}"


def test_from_path_accepts_every_form(root):
    store = open_store(f"{root}/run")
    start(store)
    first, second = commit_manifest(store, 10), commit_manifest(store, 20)
    expected = {
        "run": second,
        "run/checkpoints": second,
        f"run/{first.folder}": first,
        f"run/{first.manifest_key}": first,
        f"run/{second.folder}": second,
    }
    for path, here in expected.items():
        for slash in ("", "/", "//") if not path.endswith(".json") else ("",):
            selection = select.from_path(f"{root}/{path}{slash}")
            assert selection is not None, path
            assert selection.manifest.step == here.step
            assert selection.commit == here
            key = f"{selection.urls[0]}/{selection.commit.manifest_key}"
            assert open_store(key.rpartition("/")[0]).entries("") == ["manifest.json"]


def test_from_path_of_copies_outside_a_run(root):
    store = open_store(f"{root}/copies")
    sources = open_store(f"{root}/run")
    for step, name in ((10, "good"), (30, "last"), (20, "other")):
        here = commit_manifest(sources, step)
        store.create(f"{name}/manifest.json", sources.read(here.manifest_key))
    selection = select.from_path(f"{root}/copies")
    assert (selection.commit.folder, selection.manifest.step) == ("last", 30)
    selection = select.from_path(f"{root}/copies/good/")
    assert (selection.commit.folder, selection.manifest.step) == ("good", 10)


def test_from_path_of_run_ignores_abandoned_checkpoints(root):
    store = open_store(f"{root}/run")
    for step in (0, 10):
        start(store, step)
    commit_manifest(store, 10)
    abandoned = commit_manifest(store, 20)
    assert select.from_path(f"{root}/run").manifest.step == 10
    assert select.from_path(f"{root}/run/checkpoints").manifest.step == 10
    assert select.from_path(f"{root}/run/{abandoned.folder}").manifest.step == 20  # as named


@pytest.mark.parametrize("content", [None, "notes.txt", "weights/model.pt", "attempts/0001.json"])
def test_from_path_without_a_checkpoint_returns_none(root, content):
    if content is not None:
        open_store(f"{root}/there").create(content, b'{"attempt": 1}')
    for path in ("there", "there/", "there/checkpoints", "there/weights", "there/manifest.json"):
        assert select.from_path(f"{root}/{path}") is None


def test_from_path_with_a_damaged_newest_returns_the_next(root):
    store = open_store(f"{root}/run")
    start(store)
    first, second = commit_manifest(store, 10), commit_manifest(store, 20)
    spoil(store, second)
    for path in ("run", "run/checkpoints"):
        selection = select.from_path(f"{root}/{path}")
        assert selection.commit == first
        assert len(selection.skipped) == 1
    with pytest.raises(CheckpointError, match="step-00000020"):
        select.from_path(f"{root}/run/{second.folder}")
    lineage.mark_damaged(store, first, "bytes 1 to 2 do not match")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        select.from_path(f"{root}/run")
