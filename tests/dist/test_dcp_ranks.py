"""torch.distributed.checkpoint over our format on several ranks, in and out of FSDP2."""

import io

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.sharded_models import make, parallelise, whole
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
    """All values of model and optimizer, whole, by name; as arrays, which cross processes."""
    state, optimizer_state = get_state_dict(model, optimizer)
    found = {f"model.{name}": whole(tensor).clone().numpy() for name, tensor in state.items()}
    for name, entries in optimizer_state["state"].items():
        for key, tensor in entries.items():
            found[f"optimizer.{name}.{key}"] = whole(tensor).clone().numpy()
    return found


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
    wanted = {"model": state, "optimizer": optimizer_state, "train": {"step": 0, "rates": ()}}
    for rank in range(2):
        wanted |= {f"loader.{rank}": b"", f"file.{rank}": None}
    dcp.load(wanted, storage_reader=reader(folder), no_dist=world.size == 1)
    set_state_dict(
        model, optimizer,
        model_state_dict=wanted["model"], optim_state_dict=wanted["optimizer"],
    )  # fmt: skip
    others = [wanted["train"], *(wanted[f"loader.{rank}"] for rank in range(2))]
    return values(model, optimizer), others, [wanted[f"file.{rank}"].getvalue() for rank in (0, 1)]


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
    place = location.open_location(folder)
    (commit,) = place.survey().commits
    made = place.manifest(commit)
    assert (commit.step, made.world_size, len(made.files)) == (3, 2, 2)
    assert made.tensors["model.2.weight"].grid == (2, 1)  # even: said in few words
    for name in before:  # one at a time, without a process group
        if name.startswith("model."):
            assert np.array_equal(place.reader(commit).fetch(name).numpy(), before[name])


def saved_again_and_again(world: World, folder: str):
    """Rank 1 fails in the first save; the next ones are whole, from plans that torch keeps."""
    writer = PerdureStorageWriter(f"{folder}/step-0")
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
    assert on_ranks(2, saved_again_and_again, str(tmp_path)) == [True, True]
    place = location.open_location(str(tmp_path))
    for number, commit in enumerate(place.survey().commits):
        assert place.reader(commit).fetch("x").unique().tolist() == [float(number)]
        shards = list((tmp_path / commit.folder).glob("*.safetensors"))
        assert len(shards) == len(place.manifest(commit).files)  # what failed left nothing
