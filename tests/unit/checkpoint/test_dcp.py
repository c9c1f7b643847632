"""torch.distributed.checkpoint on Perdure's storage, in one process, compared with its own."""

import dataclasses
import io
import json
import struct
from collections import OrderedDict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint import format_utils
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from trainer import checkpoint
from trainer.checkpoint import location
from trainer.checkpoint.dcp import PerdureStorageReader, PerdureStorageWriter
from trainer.checkpoint.select import pick
from trainer.errors import CheckpointError, ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


def save(state, folder, **how):
    dcp.save(state, storage_writer=PerdureStorageWriter(folder), **how)


def load(state, folder, **how):
    dcp.load(state, storage_reader=PerdureStorageReader(folder), **how)
    return state


def blank(value):
    """Return a state of the same structure with zeros for values."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    return None


def bits(tensor):
    return tensor.resolve_conj().reshape(-1).contiguous().view(torch.uint8)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(bits(one), bits(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, io.BytesIO):
        return one.getvalue() == other.getvalue()
    return type(one) is type(other) and one == other


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    return model, optimizer


STATE = {
    "weights": torch.randn(33, 7),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "half": torch.randn(5).bfloat16(),
    "complex": torch.randn(4, dtype=torch.complex128),
    "empty": torch.zeros(0, 4),
    "turned": torch.randn(6, 9).T,
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "nested": {"tuple": (1, "a", 2.5), "list": [1, [2]], "inf": float("inf"), "none": None},
    "opaque": b"\x80\x04not a pickle",
    "nothing": b"",
    "buffer": io.BytesIO(b"dataloader"),
}


# --- round trips ---------------------------------------------------------------------------------


def test_load_restores_values_and_types(tmp_path):
    save(STATE, tmp_path / "step-7")
    assert equal(load(blank(STATE), tmp_path / "step-7"), STATE)


def test_resumed_model_and_optimizer_match_torch_storage(tmp_path):
    states = []
    for reader, writer in (
        (dcp.FileSystemReader, dcp.FileSystemWriter),
        (PerdureStorageReader, PerdureStorageWriter),
    ):
        model, optimizer = trained()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        folder = tmp_path / writer.__name__
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.save(state, storage_writer=writer(folder))
        fresh = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        other = torch.optim.AdamW(fresh.parameters(), lr=0.5)
        targets = dict(zip(("model", "optimizer"), get_state_dict(fresh, other), strict=True))
        dcp.load(targets, storage_reader=reader(folder))
        set_state_dict(
            fresh, other,
            model_state_dict=targets["model"], optim_state_dict=targets["optimizer"],
        )  # fmt: skip
        fresh(torch.ones(4, 6)).sum().backward()
        other.step()
        states.append({"model": fresh.state_dict(), "optimizer": other.state_dict()["state"]})
    assert equal(states[0], states[1])


def test_async_save_is_committed_when_its_future_completes(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        writer = PerdureStorageWriter(tmp_path / "a")
        dcp.async_save({"x": torch.arange(9.0)}, storage_writer=writer).result(timeout=60)
    finally:
        torch.distributed.destroy_process_group()
    assert equal(load({"x": torch.zeros(9)}, tmp_path / "a"), {"x": torch.arange(9.0)})


def test_writer_saves_into_several_folders(tmp_path):
    writer = PerdureStorageWriter()
    for step in (10, 20):
        state = {"x": torch.full((4,), float(step))}
        dcp.save(state, storage_writer=writer, checkpoint_id=tmp_path / f"step-{step}")
    run = location.open_location(str(tmp_path))
    commits = run.survey().commits
    assert [commit.step for commit in commits] == [10, 20]
    assert not run.is_run
    for commit in commits:
        assert run.reader(commit).fetch("x").unique().tolist() == [commit.step]


@given(
    st.recursive(
        st.one_of(
            st.integers(-(2**80), 2**80), st.floats(allow_nan=False), st.text(), st.booleans(),
            st.binary(max_size=9), st.none(), st.tuples(st.integers(), st.text()),
            st.integers(0, 12).map(lambda n: torch.arange(float(n))),
        ),
        lambda children: st.dictionaries(
            st.text("abcde.", min_size=1, max_size=3), children, max_size=4
        ),
        max_leaves=12,
    ).filter(lambda state: isinstance(state, dict))
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_nesting_loads_as_with_torch_storage(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("any")
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "torch"))
    except (AssertionError, ValueError, CheckpointException):
        return  # for example two names that flatten to the same one
    expected, loaded = blank(state), blank(state)
    dcp.load(expected, storage_reader=dcp.FileSystemReader(folder / "torch"))
    save(state, folder / "perdure")
    assert equal(load(loaded, folder / "perdure"), expected)


def test_load_converts_to_target_dtype(tmp_path):
    save({"x": torch.randn(70, 3)}, tmp_path / "a")
    half, single = {"x": torch.zeros(70, 3).bfloat16()}, {"x": torch.zeros(70, 3)}
    load(half, tmp_path / "a")
    load(single, tmp_path / "a")
    assert torch.equal(half["x"], single["x"].bfloat16())


# --- stored files --------------------------------------------------------------------------------


def test_shards_are_ordinary_safetensors_files(tmp_path):
    save(STATE, tmp_path / "step-7")
    (file,) = (tmp_path / "step-7").glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        assert torch.equal(opened.get_tensor("turned"), STATE["turned"])
        assert bytes(opened.get_tensor("opaque").numpy()) == STATE["opaque"]
    manifest = json.loads((tmp_path / "step-7/manifest.json").read_text())
    assert manifest["step"] == 7
    assert manifest["objects"]["dcp"]["objects"]["nested.tuple"] == {"$tuple": [1, "a", 2.5]}


def test_no_pickle_is_stored(tmp_path):
    save({"x": torch.ones(3), "rates": {1: (0.9, 0.99)}}, tmp_path / "a")
    for file in (tmp_path / "a").iterdir():
        assert b"\x80\x02" not in file.read_bytes()
        assert b"PK\x03\x04" not in file.read_bytes()


def test_tensor_of_several_parts_is_written_correctly(tmp_path):
    """The large tensor spans several parts and blocks; small tensors share some of them."""
    torch.manual_seed(1)
    state = {f"small{i}": torch.randn(i + 1) for i in range(50)}
    state |= {"large": torch.randn(3_000_001), "turned": torch.randn(1100, 1300).T}
    save(state, tmp_path / "a")
    assert equal(load(blank(state), tmp_path / "a"), state)
    run = location.open_location(str(tmp_path / "a"))
    run.reader(pick(run, "latest")).verify()
    (file,) = (tmp_path / "a").glob("*.safetensors")
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert (length + 8) % 4096 == 0


# --- torch's own tools through it ----------------------------------------------------------------


@pytest.fixture
def with_perdure_storage(monkeypatch):
    monkeypatch.setattr(format_utils, "FileSystemReader", PerdureStorageReader)
    monkeypatch.setattr(format_utils, "FileSystemWriter", PerdureStorageWriter)


def test_dcp_to_torch_save_keeps_nesting(tmp_path, with_perdure_storage):
    state = {**STATE, "model": {"a.b": torch.ones(2)}}
    save(state, tmp_path / "a")
    format_utils.dcp_to_torch_save(tmp_path / "a", tmp_path / "one.pt")
    assert equal(torch.load(tmp_path / "one.pt", weights_only=False), state)


def test_torch_save_to_dcp_writes_perdure_format(tmp_path, with_perdure_storage):
    model, optimizer = trained()
    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "one.pt")
    format_utils.torch_save_to_dcp(tmp_path / "one.pt", tmp_path / "a")
    assert (tmp_path / "a/manifest.json").exists()
    format_utils.dcp_to_torch_save(tmp_path / "a", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=False)
    assert equal(back["model"], state["model"])
    assert back["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]


class Signed(DefaultSavePlanner):
    """A planner with a custom encoding of strings."""

    def transform_object(self, write_item, object):
        if isinstance(object, str):
            return io.BytesIO(b"signed:" + object.encode())
        return super().transform_object(write_item, object)


class Checked(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item, value):
        self.original_state_dict[read_item.dest_index.fqn] = value.read().removeprefix(b"signed:")


def test_custom_planner_reads_its_bytes_unchanged(tmp_path):
    save({"word": "hello"}, tmp_path / "a", planner=Signed())
    assert load({"word": ""}, tmp_path / "a", planner=Checked()) == {"word": b"hello"}


def test_load_rejects_custom_planner_bytes_without_unpickling(tmp_path):
    save({"word": "hello"}, tmp_path / "a", planner=Signed())
    with pytest.raises(CheckpointException) as error:
        load({"word": ""}, tmp_path / "a")
    assert "could run arbitrary code" in cause_of(error)


# --- errors --------------------------------------------------------------------------------------


def cause_of(error):
    (cause,) = {str(failure[0]) for failure in error.value.failures.values()}
    return cause


def test_save_rejects_folder_with_checkpoint(tmp_path):
    save({"x": torch.ones(3)}, tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises(CheckpointException) as error:
        save({"x": torch.zeros(3)}, tmp_path / "a")
    assert "already holds a checkpoint" in cause_of(error)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


@pytest.mark.parametrize("value", [object(), len, (torch.ones(1), 2), OrderedDict(a=object())])
def test_save_rejects_unsupported_value_by_name(tmp_path, value):
    with pytest.raises(CheckpointException) as error:
        save({"x": torch.ones(3), "odd": value}, tmp_path / "a")
    assert "odd" in cause_of(error)
    assert "never pickles" in cause_of(error)
    assert not list((tmp_path / "a").glob("*")) if (tmp_path / "a").exists() else True


def test_load_detects_flipped_bit(tmp_path):
    save({"x": torch.ones(3000)}, tmp_path / "a")
    (file,) = (tmp_path / "a").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointException) as error:
        load({"x": torch.zeros(3000)}, tmp_path / "a")
    assert "tensor 'x'" in cause_of(error)


def test_save_removes_orphaned_files_of_killed_save(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    orphan = folder / "r00000-of-00001-00000000-1.safetensors"
    orphan.write_bytes(b"half")
    (folder / "notes.txt").write_text("notes")
    save({"x": torch.ones(3)}, folder)
    assert not orphan.exists()
    assert (folder / "notes.txt").exists()


def test_load_from_missing_folder_raises(tmp_path):
    with pytest.raises(CheckpointException) as error:
        load({"x": torch.ones(1)}, tmp_path / "absent")
    assert "does not exist" in cause_of(error)
    with pytest.raises(ConfigError, match="checkpoint_id"):
        PerdureStorageReader().read_metadata()


def test_save_rejects_name_equal_to_part_key(tmp_path):
    class Cut(DefaultSavePlanner):
        """Plan the first tensor as part of a larger one, as on one of two ranks."""

        def create_local_plan(self):
            plan = super().create_local_plan()
            item = plan.items[0]
            data = dataclasses.replace(item.tensor_data, size=torch.Size([8]))
            items = [dataclasses.replace(item, tensor_data=data), *plan.items[1:]]
            return dataclasses.replace(plan, items=items)

        def create_global_plan(self, all_plans):
            return all_plans, Metadata({})

    with pytest.raises(CheckpointException) as error:
        save({"w": torch.ones(4), "w@0": torch.ones(3)}, tmp_path / "a", planner=Cut())
    assert "would be stored as 'w@0'" in cause_of(error)


def test_save_rejects_folder_that_holds_checkpoints(tmp_path):
    save({"x": torch.ones(3)}, tmp_path / "home/step-1")
    with pytest.raises(CheckpointException) as error:
        save({"x": torch.ones(3)}, tmp_path / "home")
    assert "holds other checkpoints" in cause_of(error)


def test_writer_rejects_invalid_step(tmp_path):
    for step in (-1, "x", True):
        with pytest.raises(ConfigError, match="is not an integer between"):
            PerdureStorageWriter(tmp_path, step=step)


def test_writer_requires_collectives(tmp_path):
    with pytest.raises(CheckpointError, match="use_collectives"):
        PerdureStorageWriter(tmp_path).set_up_storage_writer(True, use_collectives=False)


# --- a run's checkpoints -------------------------------------------------------------------------


def test_dcp_load_reads_checkpoint_of_run(tmp_path):
    from trainer.checkpoint import lineage, state_tree
    from trainer.cluster.world import World
    from trainer.storage import LocalStore

    model, optimizer = trained()
    content = checkpoint.Content(objects={"scheduler": {"last_epoch": 3}})
    state_tree.add_model(content, model, with_buffers=True)
    state_tree.add_optimizers(content, model, [optimizer])
    store = LocalStore(tmp_path / "run")
    writer = checkpoint.Writer(store, World(), lineage.begin(store, {}))
    checkpoint.save(writer, content, step=5)
    fresh = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    state = load({"model": fresh.state_dict()}, tmp_path / "run")
    assert equal(dict(state["model"]), dict(model.state_dict()))


@pytest.mark.parametrize("name", ["__padding__", "__checksums__", "a\ud800"])
@pytest.mark.parametrize("value", [b"hellohel", torch.ones(2)])
def test_save_rejects_reserved_or_invalid_name(tmp_path, name, value):
    with pytest.raises(CheckpointException, match="cannot be stored"):
        dcp.save(
            {name: value, "w": torch.ones(2)}, storage_writer=PerdureStorageWriter(tmp_path / "x")
        )
    assert not list(tmp_path.rglob("*.safetensors"))
