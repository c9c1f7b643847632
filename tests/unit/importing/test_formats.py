"""torch.save and safetensors files of other programs: supported and rejected contents."""

import io
import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.state_dicts import Bomb, a_state, brought, nested, same, save_torch, to_memory
from torch import nn

from trainer.checkpoint import lineage
from trainer.checkpoint.manifest import shard_name
from trainer.errors import CheckpointError, StoreError
from trainer.importing.formats import open_external

__all__ = ["brought"]


# --- torch.save --------------------------------------------------------------------------------

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.binary(min_size=1, max_size=3),
    st.lists(st.integers(), max_size=2), st.tuples(st.integers()),
    st.builds(
        lambda shape, dtype: torch.arange(shape[0] * shape[1]).reshape(shape).to(dtype),
        st.tuples(st.integers(0, 3), st.integers(1, 3)),
        st.sampled_from([torch.float32, torch.int64, torch.bfloat16, torch.bool]),
    ),
)  # fmt: skip
keys = st.one_of(st.text("ab", min_size=1, max_size=2), st.integers(0, 3))
nests = st.recursive(
    leaves, lambda child: st.dictionaries(keys, child, max_size=3) | st.lists(child, max_size=3)
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(keys, nests, max_size=4), st.booleans())
def test_whatever_torch_saves_comes_back(tmp_path_factory, state, is_zip):
    path = tmp_path_factory.mktemp("torch") / "a.pt"
    source = open_external(save_torch(path, state, _use_new_zipfile_serialization=is_zip))
    same(nested(source), state)


@pytest.mark.parametrize("is_zip", [True, False])
def test_torch_file_is_read_from_any_store(tmp_path, brought, is_zip):
    state = a_state() | {"optimizer": {"state": {0: {"m": torch.ones(2)}}}}
    path = save_torch(tmp_path / "a.pt", state, _use_new_zipfile_serialization=is_zip)
    source = open_external(brought(path))
    assert source.kind == "a torch.save file"
    assert source.paths["optimizer.state.0.m"] == ("optimizer", "state", "0", "m")
    same(nested(source), state)


def test_shared_storage_is_found_and_only_where_all_of_it_is_the_same(tmp_path):
    w = torch.randn(4, 4)
    state = {"a": w, "b": w, "t": w.t(), "part": w[1:], "e": torch.empty(0), "f": torch.empty(0)}
    source = open_external(save_torch(tmp_path / "a.pt", state))
    assert source.aliases == {"b": "a"}
    assert sorted(source.tensors) == ["a", "e", "f", "part", "t"]
    same(nested(source), state)


@pytest.mark.parametrize(("state", "text"), [
    (torch.ones(2), "contains a Tensor; expected a dict of named tensors"),
    ([torch.ones(2)], "contains a list"),
    ({"a.b": 1, "a": {"b": 2}}, "two values have the name 'a.b'"),
    ({1: torch.ones(1), "1": 2}, "two values have the name '1'"),
    ({"a": {"s": torch.eye(2).to_sparse()}}, "'a.s' is a sparse tensor"),
    ({"m": torch.empty(2, device="meta")}, "'m' is a tensor without data"),
    ({"p": Path("x")}, r"needs pathlib\.PosixPath.*torch\.save a dict of plain tensors"),
])  # fmt: skip
def test_torch_file_with_other_contents_is_rejected(tmp_path, state, text):
    with pytest.raises(CheckpointError, match=text) as caught:
        open_external(save_torch(tmp_path / "a.pt", state))
    assert "\n" not in str(caught.value)


def test_recursive_dict_is_rejected(tmp_path):
    state = {}
    state["again"] = state
    with pytest.raises(CheckpointError, match="or contains itself"):
        open_external(save_torch(tmp_path / "a.pt", state))


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_torch_file_is_never_run(tmp_path, is_zip):
    state = {"w": torch.ones(2), "x": Bomb(tmp_path / "bomb")}
    path = save_torch(tmp_path / "a.pt", state, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r"a\.pt needs posix\.system, which could"):
        open_external(path)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("is_zip", [True, False])
def test_truncated_torch_file_is_a_user_error(tmp_path, is_zip):
    path = tmp_path / "a.pt"
    save_torch(path, a_state(), _use_new_zipfile_serialization=is_zip)
    data = path.read_bytes()
    for cut_at in range(32, len(data) - 8, len(data) // 40):
        path.write_bytes(data[:cut_at])
        with pytest.raises(CheckpointError, match=r"a\.pt"):
            open_external(str(path))


# --- safetensors -------------------------------------------------------------------------------

TENSORS = {"a.w": torch.randn(3, 2), "a.b": torch.ones(2).half(), "n": torch.tensor(3)}


def test_safetensors_file_is_read_from_any_store(tmp_path, brought):
    safetensors.torch.save_file(TENSORS, tmp_path / "a.safetensors")
    source = open_external(brought(tmp_path / "a.safetensors"))
    assert source.kind == "a safetensors file"
    assert (source.paths["a.w"], source.objects) == (("a.w",), {})
    same(
        {name: source.fetch(name) for name in sorted(source.tensors)}, dict(sorted(TENSORS.items()))
    )


@pytest.mark.parametrize("with_index", [True, False])
def test_folder_of_safetensors_files_is_read(tmp_path, brought, with_index):
    folder = tmp_path / "hf"
    folder.mkdir()
    files = {
        "a.w": "model-1-of-2.safetensors",
        "a.b": "model-1-of-2.safetensors",
        "n": "m-2.safetensors",
    }
    for file in set(files.values()):
        some = {name: TENSORS[name] for name in files if files[name] == file}
        safetensors.torch.save_file(some, folder / file)
    if with_index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        (folder / "other.safetensors").write_bytes(b"not in the index")
    source = open_external(brought(folder))
    assert source.kind == "a folder of safetensors files"
    assert set(source.tensors) == set(TENSORS)
    assert all(torch.equal(source.fetch(name), value) for name, value in TENSORS.items())


def test_names_that_safetensors_left_out_are_aliases(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    safetensors.torch.save_model(model, str(tmp_path / "a.safetensors"))
    source = open_external(str(tmp_path / "a.safetensors"))
    assert source.aliases == {"b.weight": "a.weight"}
    assert torch.equal(source.fetch("b.weight"), model["a"].weight)


def torch_folder(folder, files, index):
    """Write torch.save files and their index, as older snapshots of the Hugging Face Hub have."""
    folder.mkdir()
    for name, state in files.items():
        torch.save(state, folder / name)
    index = {"weight_map": index}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def test_folder_of_torch_files_with_an_index_is_read(tmp_path, brought):
    files = {"1.bin": {"a.w": TENSORS["a.w"]}, "2.bin": {"a.b": TENSORS["a.b"], "n": TENSORS["n"]}}
    index = {name: file for file, state in files.items() for name in state}
    folder = torch_folder(
        tmp_path / "hub", {**files, "optimizer.bin": {"x": Bomb(tmp_path)}}, index
    )
    source = open_external(brought(folder))
    assert set(source.tensors) == set(TENSORS)
    assert all(torch.equal(source.fetch(name), value) for name, value in TENSORS.items())


@pytest.mark.parametrize(("state", "text"), [
    (None, "b.bin is missing"), (lambda path: {"w": Bomb(path)}, "could execute any code"),
])  # fmt: skip
def test_folder_of_torch_files_is_complete_and_runs_no_pickle(tmp_path, brought, state, text):
    files = {"a.bin": TENSORS} | ({"b.bin": state(tmp_path / "bomb")} if state else {})
    folder = torch_folder(tmp_path / "hub", files, {"a.w": "a.bin", "w": "b.bin"})
    with pytest.raises(CheckpointError, match=text):
        open_external(brought(folder), on_pickle=print)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize(("files", "text"), [
    ({"a.safetensors": TENSORS, "b.safetensors": TENSORS}, "both have 'a.b'"),
    ({"a.safetensors": b"x" * 99}, "a.safetensors cannot be read"),
    ({"model.safetensors.index.json": b"{}"}, "is not an index"),
    ({"model.safetensors.index.json": b'{"weight_map": {"a": "../b"}}'}, "outside of the folder"),
    ({"model.safetensors.index.json": b'{"weight_map": {"a": "b.safetensors"}}'}, "is missing"),
])  # fmt: skip
def test_ambiguous_or_incomplete_folder_is_rejected(tmp_path, brought, files, text):
    (tmp_path / "hf").mkdir()
    for name, content in files.items():
        data = content if isinstance(content, bytes) else safetensors.torch.save(content)
        (tmp_path / "hf" / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=text):
        open_external(brought(tmp_path / "hf"))


def test_single_rank_part_of_safetensors_is_rejected(tmp_path):
    data = safetensors.torch.save(TENSORS, metadata={"DCP_SHARDING_INFO": "{}"})
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"one rank's shard .*consolidate_safetensors_files"):
        open_external(str(tmp_path))


# --- neither of them ---------------------------------------------------------------------------


def test_unsupported_path_returns_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("weights, honestly")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"w": [1.0]}))
    (tmp_path / "nothing").write_bytes(b"")
    for name in ("empty", "text", "plain.pkl", "nothing", "absent", "text/inner"):
        assert open_external(str(tmp_path / name)) is None
    for url in ("memory://nowhere", "memory://nowhere/a.pt", "/", "."):
        assert open_external(url) is None


def test_perdure_checkpoints_are_not_external(tmp_path):
    shard = shard_name(rank=0, world_size=1, token="0" * 8, save=1)
    for name in (lineage.MANIFEST, shard):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(safetensors.torch.save(TENSORS))
        (tmp_path / name / name).write_bytes(b"")
        assert open_external(str(tmp_path / name)) is None


def test_full_disk_for_a_remote_file_is_not_damage(tmp_path, monkeypatch):
    url = to_memory(save_torch(tmp_path / "a.pt", a_state()))

    class Full(io.BytesIO):
        name = "/tmp/x"

        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", Full)
    with pytest.raises(StoreError, match="No space left on device; set TMPDIR"):
        open_external(url)
