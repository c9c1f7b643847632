"""torch.distributed.checkpoint on Perdure's storage, on several ranks, with and without FSDP2."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.sharded_models import full_tensor, make, parallelise
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from trainer.checkpoint import location
from trainer.checkpoint.dcp import PerdureStorageReader, PerdureStorageWriter
from trainer.cluster.world import World


def fresh(world: World, how: str, seed: int):
    model = parallelise(make(seed), how, world)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def step(model, optimizer):
    torch.manual_seed(7)
    model(torch.randn(8, 10)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def values(model, optimizer):
    """Return all values of model and optimizer by name, unsharded, as NumPy arrays."""
    state, optimizer_state = get_state_dict(model, optimizer)
    arrays = {
        f"model.{name}": full_tensor(tensor).clone().numpy() for name, tensor in state.items()
    }
    for name, entries in optimizer_state["state"].items():
        for key, tensor in entries.items():
            arrays[f"optimizer.{name}.{key}"] = full_tensor(tensor).clone().numpy()
    return arrays


def save(world: World, folder: str, how: str, writer: type):
    model, optimizer = fresh(world, how, seed=0)
    step(model, optimizer)
    state, optimizer_state = get_state_dict(model, optimizer)
    state = {
        "model": state,
        "optimizer": optimizer_state,
        "train": {"step": 3, "rates": (0.1, 0.2)},
        f"loader.{world.rank}": f"rank {world.rank}".encode(),
        f"file.{world.rank}": io.BytesIO(b"\x80" * (world.rank + 1)),
    }
    dcp.save(state, storage_writer=writer(folder))
    return values(model, optimizer)


def load(world: World, folder: str, how: str, reader: type):
    model, optimizer = fresh(world, how, seed=1)
    step(model, optimizer)
    state, optimizer_state = get_state_dict(model, optimizer)
    state_dict = {"model": state, "optimizer": optimizer_state, "train": {"step": 0, "rates": ()}}
    for rank in range(2):
        state_dict |= {f"loader.{rank}": b"", f"file.{rank}": None}
    dcp.load(state_dict, storage_reader=reader(folder), no_dist=world.size == 1)
    set_state_dict(
        model, optimizer,
        model_state_dict=state_dict["model"], optim_state_dict=state_dict["optimizer"],
    )  # fmt: skip
    others = [state_dict["train"], *(state_dict[f"loader.{rank}"] for rank in range(2))]
    return (
        values(model, optimizer),
        others,
        [state_dict[f"file.{rank}"].getvalue() for rank in (0, 1)],
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoint_of_two_ranks_loads_on_one_or_three(tmp_path, on_ranks):
    folder = str(tmp_path / "step-3")
    before = on_ranks(2, save, folder, "fsdp", PerdureStorageWriter)[0]
    for how, size in (("plain", 1), ("fsdp", 3)):
        for after, others, files in on_ranks(size, load, folder, how, PerdureStorageReader):
            assert after.keys() == before.keys()
            for name, value in before.items():
                assert np.array_equal(after[name], value), name
            assert others == [{"step": 3, "rates": (0.1, 0.2)}, b"rank 0", b"rank 1"]
            assert files == [b"\x80", b"\x80\x80"]
    run = location.open_location(folder)
    (commit,) = run.survey().commits
    manifest = run.manifest(commit)
    assert (commit.step, manifest.world_size, len(manifest.files)) == (3, 2, 2)
    assert manifest.tensors["model.2.weight"].grid == (2, 1)  # stored compactly as a grid
    for name in before:  # one at a time, without a process group
        if name.startswith("model."):
            assert np.array_equal(run.reader(commit).fetch(name).numpy(), before[name])


def save_repeatedly(world: World, folder: str):
    """Fail the first save on rank 1, then save repeatedly with cached plans."""
    writer = PerdureStorageWriter(f"{folder}/step-0")
    reserved = {"__checksums__": torch.ones(2)} if world.rank == 1 else {}
    with pytest.raises(CheckpointException, match=r"'__checksums__' .* cannot be stored"):
        dcp.save({"x": torch.zeros(6), f"own.{world.rank}": 1, **reserved}, storage_writer=writer)
    assert not list(Path(folder).rglob("*.safetensors"))  # rejected before any rank wrote
    state = {"x": torch.zeros(6), f"own.{world.rank}": object() if world.rank == 1 else 1}
    with pytest.raises(CheckpointException, match=r"own\.1"):
        dcp.save(state, storage_writer=writer)
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    for number in range(3):
        state = {"x": torch.full((6,), float(number)), f"own.{world.rank}": number}
        folder_now = f"{folder}/step-{number}"
        dcp.save(state, storage_writer=writer, checkpoint_id=folder_now, planner=planner)
    return True


def test_failing_rank_aborts_save_and_cached_plans_stay_valid(tmp_path, on_ranks):
    assert on_ranks(2, save_repeatedly, str(tmp_path)) == [True, True]
    run = location.open_location(str(tmp_path))
    for number, commit in enumerate(run.survey().commits):
        assert run.reader(commit).fetch("x").unique().tolist() == [float(number)]
        shards = list((tmp_path / commit.folder).glob("*.safetensors"))
        assert len(shards) == len(run.manifest(commit).files)  # the failed save left no files
