"""Resharding on load: FSDP2, two-dimensional meshes, plain tensors, any world sizes."""

import json
import math
import random
import tempfile

import pytest
import torch
import torch.distributed as dist
from support.saved_tensors import copied, fetch_optimizer, from_bits, ones, raw_bytes
from support.sharded_models import full_tensor, make, parallelise
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from trainer import checkpoint
from trainer.checkpoint import lineage, state_tree
from trainer.checkpoint.plan import DTYPE_NAMES
from trainer.cluster.world import World
from trainer.storage import LocalStore


def begin(world: World, folder: str) -> checkpoint.Writer:
    store = LocalStore(folder)
    return checkpoint.Writer(store, world, world.run_on_rank0(lambda: lineage.begin(store, {})))


# --- a model and its optimizer -------------------------------------------------------------------


def train_and_save(world: World, folder: str, how: str):
    model = parallelise(make(), how, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(6, 10, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    content = checkpoint.Content(objects={"run": {}})
    state_tree.add_model(content, model, with_buffers=world.rank == 0)
    state_tree.add_optimizers(content, model, [optimizer])
    checkpoint.save(begin(world, folder), content, step=3)
    return {
        name: raw_bytes(full_tensor(value)) for name, value in state_of(model, optimizer).items()
    }


def state_of(model, optimizer):
    content = checkpoint.Content()
    state_tree.add_model(content, model, with_buffers=True)
    state_tree.add_optimizers(content, model, [optimizer])
    return {**content.tensors, **content.rank_local}


def load(world: World, folder: str, how: str):
    store = LocalStore(folder)
    manifest = checkpoint.latest(store)
    model = parallelise(make(seed=9), how, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    reader = checkpoint.Reader(store, f"checkpoints/{manifest.folder}", manifest)
    reader.read(state_tree.model_targets(model))
    fetch_optimizer(store, manifest, model, optimizer)
    shardings = {isinstance(p, DTensor) for p in model.parameters()}
    assert shardings == {how != "plain"}
    assert isinstance(optimizer.state[next(model.parameters())]["exp_avg"], DTensor) == (
        how != "plain"
    )
    return {
        name: raw_bytes(full_tensor(value)) for name, value in state_of(model, optimizer).items()
    }


@pytest.mark.slow
def test_checkpoint_loads_under_any_other_sharding(on_ranks, tmp_path):
    for name, size, how in [("f", 2, "fsdp"), ("h", 4, "hsdp"), ("p", 2, "plain")]:
        folder = str(tmp_path / name)
        saved = on_ranks(size, train_and_save, folder, how)
        assert all(answer == saved[0] for answer in saved)
        for other_size, other in [(1, "plain"), (3, "fsdp"), (4, "hsdp")]:
            for answer in on_ranks(other_size, load, folder, other):
                assert answer == saved[0]


def test_even_sharding_is_stored_as_grid(on_ranks, tmp_path):
    on_ranks(2, train_and_save, str(tmp_path), "fsdp")
    text = next(tmp_path.glob("checkpoints/*/manifest.json")).read_text()
    tensors = json.loads(text)["tensors"]
    assert tensors["model.0.weight"]["grid"] == [2, 1]
    assert tensors["optimizer.2.bias.exp_avg"]["grid"] == [2]
    assert tensors["optimizer.4.weight.exp_avg"]["file"] == 0  # one row, two ranks
    assert not any("columns" in entry for entry in tensors.values())


# --- any tensors, any shardings, any world sizes -------------------------------------------------

DTYPES = list(DTYPE_NAMES)


def random_tensor(rng: random.Random) -> torch.Tensor:
    dtype = rng.choice(DTYPES)
    shape = [rng.choice([0, 1, 1, 2, 3, 5, 8, 13]) for _ in range(rng.randrange(4))]
    noise = rng.randbytes(math.prod(shape) * dtype.itemsize)
    return from_bits(bytes(n % 2 for n in noise) if dtype == torch.bool else noise, dtype, shape)


def random_layout(rng: random.Random, tensor: torch.Tensor, meshes: list[DeviceMesh]):
    """Return a random mesh and placements for a tensor, or None for a plain tensor."""
    mesh = rng.choice(meshes)
    if tensor.ndim == 0 or rng.random() < 0.4:
        return None
    placements = [
        Replicate() if rng.random() < 0.3 else Shard(rng.randrange(tensor.ndim))
        for _ in range(mesh.ndim)
    ]
    return mesh, placements


def spread(tensor, layout, rng):
    """Distribute a tensor; a plain one sometimes becomes a non-contiguous view."""
    if layout is None:
        if tensor.ndim >= 2 and rng.random() < 0.5:
            return copied(tensor.transpose(0, 1)).transpose(0, 1)
        return copied(tensor)
    # send bytes as integers: gloo supports few dtypes
    carrier = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    item_bytes = tensor.element_size()
    if item_bytes == 16:
        mesh, placements = layout
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    mesh, placements = layout
    carried = distribute_tensor(
        tensor.view(carrier[item_bytes]), mesh, placements, src_data_rank=None
    )
    local = carried.to_local().view(tensor.dtype)
    return DTensor.from_local(
        local, mesh, placements, shape=tensor.shape, stride=tensor.stride(), run_check=False
    )


def sub_world(world: World, size: int) -> World | None:
    groups = [dist.new_group(list(range(size)), backend="gloo") for _ in range(2)]
    if world.rank >= size:
        return None
    return World(world.rank, size, world.rank, size, world.device, *groups)


def meshes_of(size: int) -> list[DeviceMesh]:
    shapes = [(size,)] + [(a, size // a) for a in range(2, size) if size % a == 0]
    return [DeviceMesh("cpu", torch.arange(size).reshape(shape)) for shape in shapes]


def round_trips(world: World, folder: str, seed: int, examples: int):
    """Save random tensors on m of 8 ranks and load on n; all ranks use the same seed."""
    rng = random.Random(seed)
    worlds = {size: sub_world(world, size) for size in range(1, world.size + 1)}
    meshes = {size: meshes_of(size) for size in worlds}
    compared = 0
    for example in range(examples):
        tensors = {f"t{i}": random_tensor(rng) for i in range(rng.randrange(1, 8))}
        shapes = {}
        for phase in ("save", "load"):
            size = rng.randrange(1, world.size + 1)
            layouts = {
                name: random_layout(rng, tensor, meshes[size]) for name, tensor in tensors.items()
            }
            shapes[phase] = (size, layouts)
        where = f"{folder}/{example}"
        store = LocalStore(where)
        size, layouts = shapes["save"]
        if (here := worlds[size]) is not None:
            local = {f"own.{here.rank}": torch.arange(here.rank + 1)}
            content = checkpoint.Content(
                {name: spread(t, layouts[name], rng) for name, t in tensors.items()},
                local,
                objects={"example": example, "seed": [seed, None, 1.5, "é"]},
            )
            checkpoint.save(begin(here, where), content, step=1)
        dist.barrier(group=world.control)
        rng.seed(f"{seed} {example}")  # ranks outside of the group have drawn less
        size, layouts = shapes["load"]
        if worlds[size] is not None:
            manifest = checkpoint.latest(store)
            assert manifest.objects == {"example": example, "seed": [seed, None, 1.5, "é"]}
            checkpoint.verify(store, manifest)
            expected = {n: spread(t, layouts[n], random.Random(0)) for n, t in tensors.items()}
            targets = {
                name: spread(ones(t.shape, t.dtype), layouts[name], random.Random(0))
                for name, t in tensors.items()
            }
            checkpoint.load(store, manifest, targets)
            for name, target in targets.items():
                actual, reference = (
                    t.to_local() if isinstance(t, DTensor) else t for t in (target, expected[name])
                )
                assert raw_bytes(actual) == raw_bytes(reference), (example, name, shapes)
                compared += 1
        rng.seed(f"{seed} {example} next")
        dist.barrier(group=world.control)
    return compared


@pytest.mark.slow
def test_any_tree_comes_back_bit_equal_at_any_world_sizes(on_ranks):
    with tempfile.TemporaryDirectory() as folder:
        assert sum(on_ranks(8, round_trips, folder, 1, 60)) > 100
