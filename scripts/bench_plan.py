"""Time and memory of planning a save, on real ranks and on 512 simulated ones."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_state import Job

from trainer import checkpoint
from trainer.checkpoint import lineage, plan, values
from trainer.cluster.world import World
from trainer.storage import LocalStore


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def bench_plan(job: Job, world: World, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Measure the seconds before the snapshot, and the memory a save adds, in bytes."""
    store = LocalStore(folder / "perdure")
    writer = checkpoint.Writer(store, world, world.run_on_rank0(lambda: lineage.begin(store, {})))
    content = job.content()
    began = time.perf_counter()
    first = plan.make(content, world)
    seconds = {"first plan": [time.perf_counter() - began], "second plan": [], "state": []}
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    checkpoint.save(writer, content, step=1)
    extra = resident_bytes("VmHWM") - before
    seconds["extra memory / (state / world size)"] = [extra / (job.nbytes() / world.size)]
    for _ in range(10 * rounds):
        began = time.perf_counter()
        content = job.content()
        values.decode(values.encode(content.objects, "objects"))
        seconds["state"].append(time.perf_counter() - began)
        began = time.perf_counter()
        assert plan.make(content, world, first) is first
        seconds["second plan"].append(time.perf_counter() - began)
    return seconds


def bench_scale(ranks: int, count: int) -> dict[str, float]:
    """Measure plan and manifest on rank 0 of `ranks` simulated ranks with sharded tensors."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from trainer.checkpoint import manifest

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
    content = checkpoint.Content()
    rows = 4
    for number in range(count):
        for key in ("model.layer_{}.weight", "optimizer.layer_{}.weight.exp_avg",
                    "optimizer.layer_{}.weight.exp_avg_sq"):  # fmt: skip
            content.tensors[key.format(number)] = DTensor.from_local(
                torch.zeros(rows, 8), mesh, [Shard(0)], run_check=False
            )
        content.tensors[f"optimizer.layer_{number}.weight.step"] = torch.zeros(())
    world = _Alone(0, ranks)
    before = resident_bytes("VmRSS")
    began = time.perf_counter()
    division = plan.make(content, world)
    first_s = time.perf_counter() - began
    began = time.perf_counter()
    assert plan.make(content, world, division) is division
    second_s = time.perf_counter() - began
    files = {
        manifest.shard_name(rank=rank, world_size=ranks, token="0" * 8, save=1): manifest.ShardFile(
            division.layout.total_bytes, division.layout.header_bytes, "0" * 16
        )
        for rank in range(ranks)
    }
    record = manifest.Manifest(
        step=1, epoch=0, samples=0, attempt=1, token="0" * 8, save=1, world_size=ranks,
        versions={}, tensors=division.entries, files=files, objects={},
    )  # fmt: skip
    began = time.perf_counter()
    data = manifest.to_bytes(record)
    dump_s = time.perf_counter() - began
    began = time.perf_counter()
    assert manifest.from_bytes(data, "x") == record
    parse_s = time.perf_counter() - began
    memory_bytes = resident_bytes("VmHWM") - before
    dist.destroy_process_group()
    return {
        "first plan, s": first_s, "second plan, s": second_s, "manifest, MB": len(data) / 1e6,
        "write manifest, s": dump_s, "parse manifest, s": parse_s,
        "header of a shard, MB": division.layout.header_bytes / 1e6,
        "memory, MB": memory_bytes / 1e6,
    }  # fmt: skip


class _Alone(World):
    """Rank 0 of a simulated world in which all ranks contribute the same values."""

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size

    def all(self, value: bool) -> bool:
        return value
