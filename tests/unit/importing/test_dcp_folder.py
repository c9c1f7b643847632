"""DCP folders: every tensor is read, and no code in a hostile folder runs."""

import io
import os
import pickle
from importlib import import_module
from pathlib import Path

import pytest
import torch
from support.state_dicts import Bomb, a_state, brought, nested, same, save_dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

from trainer.errors import CheckpointError
from trainer.importing import pickles
from trainer.importing.formats import open_external

__all__ = ["brought"]


def metadata(folder):
    return pickle.loads((Path(folder) / ".metadata").read_bytes())


def tampered(folder, change):
    """Write a DCP folder whose metadata is modified by `change`."""
    save_dcp(folder, a_state())
    meta = metadata(folder)
    change(meta)
    (folder / ".metadata").write_bytes(pickle.dumps(meta))
    return str(folder)


def stored(meta, name):
    return next(info for index, info in meta.storage_data.items() if index.fqn == name)


def test_dcp_folder_round_trips_every_tensor(tmp_path, brought):
    source = open_external(brought(save_dcp(tmp_path / "a", a_state())))
    assert source.kind == "a DCP folder (torch.distributed.checkpoint)"
    assert source.tensors["model.half"] == (torch.bfloat16, (4,))
    assert source.paths["optimizer.param_groups.0.lr"] == ("optimizer", "param_groups", 0, "lr")
    same(nested(source), a_state())
    with pytest.raises(CheckpointError, match="has no tensor 'epoch'"):
        source.fetch("epoch")


def test_dcp_folder_without_planner_data_keeps_its_names(tmp_path):
    url = tampered(tmp_path / "a", lambda meta: setattr(meta, "planner_data", None))
    assert open_external(url).paths["model.w"] == ("model.w",)


def test_objects_that_torch_would_unpickle_stay_bytes(tmp_path):
    bomb = tmp_path / "bomb"
    state = {"stream": io.BytesIO(b"x"), "bomb": Bomb(bomb), "pair": (1, torch.ones(2)), "n": 1}
    source = open_external(save_dcp(tmp_path / "a", state))
    assert source.objects["n"] == 1
    pair = torch.load(io.BytesIO(source.objects["pair"]), weights_only=True)
    assert torch.equal(pair[1], torch.ones(2))
    assert type(source.objects["bomb"]) is type(source.objects["stream"]) is bytes
    assert not bomb.exists()


def test_every_name_of_torch_that_is_known_still_exists():
    for module, name in pickles.ALLOWED:
        if module.startswith(("torch", "collections", "builtins")):
            assert hasattr(import_module(module), name), f"torch has no {module}.{name} any more"


def test_code_in_metadata_is_named_and_never_run(tmp_path):
    bomb = tmp_path / "bomb"
    for number, content in enumerate(
        [Bomb(bomb), Metadata({"w": Bomb(bomb)}), Metadata({}, planner_data=[Bomb(bomb)])]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError, match=r"/\.metadata needs posix\.system, which"):
            open_external(str(folder))
    assert not bomb.exists()


@pytest.mark.parametrize("name", [nn.Linear, torch.load, eval, os.system, Path.unlink])
def test_metadata_rejects_every_other_global(name):
    with pytest.raises(CheckpointError, match="needs"):
        pickles.metadata(pickle.dumps([name]), "here")


def test_class_stubs_cannot_be_modified_by_a_pickle():
    opcodes = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    for state in (b"(N(dVchunks\nI1\nstb.", b"(dVchunks\nI1\nsb."):
        with pytest.raises(CheckpointError, match="cannot be read"):
            pickles.metadata(opcodes + state, "here")
    assert pickles.Record().chunks is None


def test_code_in_a_tensor_part_is_rejected(tmp_path):
    bomb, blob = tmp_path / "bomb", io.BytesIO()
    torch.save(Bomb(bomb), blob)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "evil.distcp").write_bytes(blob.getvalue())

    def change(meta):
        info = stored(meta, "model.w")
        info.relative_path, info.offset, info.length = "evil.distcp", 0, len(blob.getvalue())

    source = open_external(tampered(tmp_path / "a", change))
    with pytest.raises(CheckpointError, match=r"evil\.distcp: tensor 'model\.w' needs posix"):
        source.fetch("model.w")
    assert not bomb.exists()


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "a\\b", "", "a//b", 3, "a\0b"]
)
def test_no_file_outside_of_the_folder_is_opened(tmp_path, path):
    def change(meta):
        stored(meta, "model.w").relative_path = path

    with pytest.raises(CheckpointError, match=r"has the (invalid )?file name"):
        open_external(tampered(tmp_path / "a", change))


def in_two(meta):
    """Declare two parts of a tensor of 5 rows, of 3 rows and of 3."""
    meta.state_dict_metadata["model.w"].chunks = [
        ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([3, 3])) for at in (0, 2)
    ]


@pytest.mark.parametrize(("change", "text"), [
    (lambda meta: meta.storage_data.clear(), "malformed"),
    (in_two, "parts of 'model.w' do not cover it once"),
    (lambda meta: meta.state_dict_metadata["model.w"].chunks.clear(), "parts of 'model.w'"),
    (lambda meta: setattr(meta.state_dict_metadata["model.w"], "size", None), "malformed"),
    (lambda meta: setattr(stored(meta, "epoch"), "offset", -1), "-1.* are not natural numbers"),
    (lambda meta: setattr(stored(meta, "epoch"), "transform_descriptors", ["zstd"]), "zstd"),
    (lambda meta: meta.planner_data.update(epoch=(1.5,)), "is not a path for 'epoch'"),
])  # fmt: skip
def test_contradictory_metadata_is_rejected(tmp_path, change, text):
    with pytest.raises(CheckpointError, match=text):
        open_external(tampered(tmp_path / "a", change))


def swap(meta):
    """Give one tensor the bytes of another."""
    info, other = stored(meta, "model.w"), stored(meta, "model.half")
    info.offset, info.length = other.offset, other.length


def cut(meta):
    stored(meta, "model.w").length = 10


@pytest.mark.parametrize(("change", "text"), [
    (swap, "tensor 'model.w' is torch.bfloat16 .*but .metadata has torch.float32"),
    (cut, "has only 10 bytes"),
    (lambda meta: setattr(stored(meta, "model.w"), "relative_path", "b"), "/b is missing"),
    (lambda meta: setattr(stored(meta, "model.w"), "length", 1 << 60), "the file was truncated"),
    (lambda meta: setattr(stored(meta, "model.w"), "offset", 1), "not in torch.save format"),
])  # fmt: skip
def test_bytes_that_contradict_the_metadata_are_rejected(tmp_path, change, text):
    source = open_external(tampered(tmp_path / "a", change))
    with pytest.raises(CheckpointError, match=text):
        source.fetch("model.w")


def test_damaged_part_is_rejected_with_its_file_name(tmp_path):
    url = save_dcp(tmp_path / "a", a_state())
    file = tmp_path / "a" / "__0_0.distcp"
    info = stored(metadata(url), "model.w")
    data = bytearray(file.read_bytes())
    data[info.offset + 8 : info.offset + info.length] = bytes(info.length - 8)
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: tensor 'model\.w' cannot be read"):
        open_external(url).fetch("model.w")


def test_dcp_folder_with_other_serialization_is_rejected(tmp_path):
    state = {"w": torch.ones(30)}
    url = save_dcp(tmp_path / "a", state, serialization_format=SerializationFormat.SAFETENSORS)
    with pytest.raises(CheckpointError, match="unsupported serialization_format=SAFETENSORS"):
        open_external(url).fetch("w")


def test_metadata_that_was_cut_or_altered_is_an_error_and_never_a_traceback(tmp_path):
    folder = tmp_path / "a"
    file = Path(save_dcp(folder, a_state())) / ".metadata"
    data = file.read_bytes()
    for cut_at in range(0, len(data), 11):
        file.write_bytes(data[:cut_at])
        with pytest.raises(CheckpointError, match="metadata"):
            open_external(str(folder))
    for at in range(0, len(data), 5):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x11]) + data[at + 1 :])
        try:
            nested(open_external(str(folder)))
        except CheckpointError:
            continue
