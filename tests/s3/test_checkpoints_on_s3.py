"""python -m trainer.checkpoints and torch.distributed.checkpoint on a real S3 server."""

import json
import uuid

import pytest
import torch
import torch.distributed.checkpoint as dcp

from scripts.s3_server import BUCKET
from trainer import checkpoint, checkpoints
from trainer.checkpoint import Content, lineage
from trainer.checkpoint.dcp import PerdureStorageReader, PerdureStorageWriter
from trainer.cluster.world import World
from trainer.storage import open_store


@pytest.fixture
def location(s3) -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def call(capsys, *arguments) -> dict:
    code = checkpoints.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    return {"code": code, **json.loads(out)}


def test_commands_list_verify_diff_copy_and_prune_a_run_in_a_bucket(location, tmp_path, capsys):
    torch.manual_seed(0)
    store = open_store(f"{location}/run")
    writer = checkpoint.Writer(store, World(), lineage.begin(store, {}))
    weights = torch.randn(3_000_000)  # two parts
    for step in (1, 2, 3):
        content = Content(tensors={"model.w": weights + (step == 3), "model.b": torch.ones(5)})
        checkpoint.save(writer, content, step=step)
    run = f"{location}/run"
    entries = call(capsys, "list", run)["checkpoints"]
    assert [(entry["step"], entry["state"]) for entry in entries] == [
        (step, "whole") for step in (1, 2, 3)
    ]
    assert all(entry["saved"] for entry in entries)
    assert call(capsys, "verify", run)["code"] == 0
    assert call(capsys, "diff", run, "step=1,2")["equal_tensors"] == 2
    assert [c["name"] for c in call(capsys, "diff", run, "step=2,3")["changed"]] == ["model.w"]
    assert call(capsys, "copy", run, tmp_path / "here")["copied"] == [1, 2, 3]
    assert call(capsys, "copy", tmp_path / "here", f"{location}/there")["copied"] == [1, 2, 3]
    assert call(capsys, "diff", run, f"{location}/there")["is_equal"]
    pruned = call(capsys, "prune", run, "keep_last=1", "--yes")
    assert pruned["kept"] == [3]
    assert [entry["step"] for entry in call(capsys, "list", run)["checkpoints"]] == [3]
    assert [key for key in store.list("checkpoints") if "00000003" not in key] == []
    damaged = open_store(f"{location}/there")
    shard = next(key for key in damaged.list("checkpoints") if "00000002" in key and "r0" in key)
    data = bytearray(damaged.read(shard))
    data[-1000] ^= 1
    damaged.replace(shard, bytes(data))
    report = call(capsys, "verify", f"{location}/there")
    assert report["code"] == 1
    assert [bool(entry["damage"]) for entry in report["checkpoints"]] == [False, True, False]
    assert "tensor 'model.w'" in report["checkpoints"][1]["damage"]


def test_list_reports_a_missing_run_and_returns_2(location, capsys):
    assert checkpoints.main(["list", f"{location}/nothing"]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_saves_to_and_loads_from_a_bucket(location, capsys):
    state = {"model": {"w": torch.randn(2_500_000)}, "step": 7, "opaque": b"\x80x"}
    dcp.save(state, storage_writer=PerdureStorageWriter(f"{location}/step-7"))
    loaded = {"model": {"w": torch.zeros(2_500_000)}, "step": 0, "opaque": b""}
    dcp.load(loaded, storage_reader=PerdureStorageReader(f"{location}/step-7"))
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert (loaded["step"], loaded["opaque"]) == (7, b"\x80x")
    assert [entry["step"] for entry in call(capsys, "list", location)["checkpoints"]] == [7]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_copy_of_a_dcp_folder_to_a_bucket_is_loadable(location, tmp_path, capsys):
    state = {"model": {"w": torch.randn(1000)}, "rates": (1, 2.5)}
    dcp.save(state, checkpoint_id=tmp_path / "stock", no_dist=True)
    call(capsys, "copy", tmp_path / "stock", f"{location}/step-9")
    loaded = {"model": {"w": torch.zeros(1000)}, "rates": None}
    dcp.load(loaded, storage_reader=PerdureStorageReader(f"{location}/step-9"))
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert loaded["rates"] == (1, 2.5)
