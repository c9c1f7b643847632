"""A DCP folder written by several ranks, read by one process without a process group."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.sharded_models import full_tensor, make, parallelise
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from trainer.cluster.world import World
from trainer.importing.formats import open_external

SHAPES = {"even": (8, 3), "uneven": (5, 3), "one_row": (1, 7), "vector": (6,), "empty": (0, 2)}


def tensor(name):
    shape = SHAPES[name]
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def save_tensors(world: World, folder: str):
    mesh = init_device_mesh("cpu", (world.size,))
    state = {"plain": torch.arange(4), f"rank.{world.rank}": torch.tensor(world.rank)}
    for name, shape in SHAPES.items():
        for how in [Replicate(), *(Shard(axis) for axis in range(len(shape)))]:
            state[f"{name}.{how}"] = distribute_tensor(tensor(name), mesh, [how])
    dcp.save(state, checkpoint_id=folder)


def save_grid(world: World, folder: str):
    mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("a", "b"))
    placements = {"both": [Shard(0), Shard(1)], "one": [Replicate(), Shard(0)]}
    state = {
        f"{name}.{how}": distribute_tensor(tensor(name), mesh, placements[how])
        for name in ("even", "uneven")
        for how in placements
    }
    dcp.save(state, checkpoint_id=folder)


def save_fsdp(world: World, folder: str):
    model = parallelise(make(), "fsdp", world)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 10)).square().mean().backward()
    optimizer.step()
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)
    return {name: full_tensor(value).clone().numpy() for name, value in state.items()}


def test_parts_of_two_ranks_are_assembled(tmp_path, on_ranks):
    on_ranks(2, save_tensors, str(tmp_path / "a"))
    source = open_external(str(tmp_path / "a"))
    assert len(list((tmp_path / "a").glob("*.distcp"))) == 2
    assert torch.equal(source.fetch("plain"), torch.arange(4))
    assert [int(source.fetch(f"rank.{rank}")) for rank in range(2)] == [0, 1]
    cut = [name for name in source.tensors if name.split(".")[0] in SHAPES]
    assert len(cut) == 14
    for name in cut:
        assert torch.equal(source.fetch(name), tensor(name.split(".")[0])), name


@pytest.mark.slow
def test_parts_of_rank_grid_are_assembled(tmp_path, on_ranks):
    on_ranks(4, save_grid, str(tmp_path / "a"))
    source = open_external(str(tmp_path / "a"))
    assert len(source.tensors) == 4
    for name in source.tensors:
        assert torch.equal(source.fetch(name), tensor(name.split(".")[0])), name


@pytest.mark.slow
def test_fsdp_weights_are_assembled(tmp_path, on_ranks):
    expected = on_ranks(2, save_fsdp, str(tmp_path / "a"))[0]
    source = open_external(str(tmp_path / "a"))
    assert {n for n in source.tensors if n.startswith("model.")} == {f"model.{n}" for n in expected}
    for name, value in expected.items():
        assert torch.equal(source.fetch(f"model.{name}"), torch.from_numpy(value)), name
