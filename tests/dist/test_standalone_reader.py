"""The reader in the documentation reads sharded checkpoints of any dtypes."""

from pathlib import Path

import torch
from support.saved_tensors import raw_bytes
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from trainer import checkpoint
from trainer.checkpoint import Content, lineage
from trainer.cluster.world import World
from trainer.storage import LocalStore

READER = Path(__file__).parents[2] / "docs/examples/read_checkpoint.py"
KINDS = (
    torch.float32, torch.complex128, torch.complex32, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e8m0fnu, torch.float8_e5m2fnuz, torch.bool,
)  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    """Return a tensor of every kind, shape and sharding."""
    complete = {}
    for kind in KINDS:
        for how, shape in {"rows": (6, 5), "mesh": (6, 8), "plain": (3,), "none": (0, 4)}.items():
            count = torch.Size(shape).numel() * kind.itemsize
            bits = torch.arange(count, dtype=torch.uint8) % (2 if kind == torch.bool else 251)
            complete[f"{how}.{kind}"] = bits.view(kind).reshape(shape)
    complete["cut"] = torch.arange(3.0 * 50_000).reshape(3, 50_000)
    return complete


def sharded(tensor: torch.Tensor, mesh: DeviceMesh, placements: list[Shard]) -> DTensor:
    """Return this rank's part of a tensor."""
    part = tensor
    for axis, placement in enumerate(placements):
        pieces = part.chunk(mesh.size(axis), placement.dim)
        number = mesh.get_local_rank(axis)
        is_empty = number >= len(pieces)
        part = part.narrow(placement.dim, 0, 0) if is_empty else pieces[number]
    return DTensor.from_local(
        part, mesh, placements, shape=tensor.shape, stride=tensor.stride(), run_check=False
    )


def save(world: World, folder: str) -> None:
    ranks = torch.arange(world.size)
    shardings = {
        "rows": (DeviceMesh("cpu", ranks), [Shard(0)]),
        "mesh": (DeviceMesh("cpu", ranks.reshape(2, -1)), [Shard(1), Shard(0)]),
    }
    content = Content(aliases={"tied": "cut"})
    for name, tensor in tensors().items():
        sharding = shardings.get(name.partition(".")[0])
        content.tensors[name] = tensor if sharding is None else sharded(tensor, *sharding)
    store = LocalStore(folder)
    attempt = world.run_on_rank0(lambda: lineage.begin(store, {}))
    checkpoint.save(checkpoint.Writer(store, world, attempt), content, step=1)


def test_standalone_reader_reads_shards_of_four_ranks(on_ranks, tmp_path):
    on_ranks(4, save, str(tmp_path))
    names = {"__name__": "read_checkpoint"}
    exec(compile(READER.read_text(), READER.name, "exec"), names)
    manifest, arrays = names["read"](names["newest"](tmp_path))
    entries = manifest["tensors"]
    assert entries["rows.torch.float32"]["grid"] == [3, 1]
    assert manifest["file_lists"][entries["mesh.torch.complex32"]["file_list"]] == [0, 2, 1, 3]
    assert "columns" in entries["cut"]
    assert arrays.pop("tied") is arrays["cut"]
    assert set(arrays) == set(tensors())
    for name, tensor in tensors().items():
        assert arrays[name].tobytes() == bytes(raw_bytes(tensor)), name
        assert arrays[name].shape == tensor.shape
