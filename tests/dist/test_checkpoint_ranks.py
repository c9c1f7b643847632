"""Checkpoints of several ranks: replicas once, rank 0's buffers, one failure aborts all."""

import json

import torch
from safetensors import safe_open
from torch import nn

from trainer import checkpoint
from trainer.checkpoint import lineage, state_tree
from trainer.checkpoint.shard import RESERVED
from trainer.cluster.world import World
from trainer.core import rng
from trainer.errors import CheckpointError, StoreError
from trainer.storage import LocalStore


def make_model():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64) for _ in range(6)]
    return nn.Sequential(nn.Linear(1000, 5000), nn.Linear(5000, 64), *layers, nn.BatchNorm1d(64))


def content_of(world: World, model: nn.Module):
    content = checkpoint.Content()
    state_tree.add_model(content, model, with_buffers=world.rank == 0)
    for name, value in rng.capture().items():
        content.rank_local[f"rng.{world.rank}.{name}"] = value
    content.objects["run"] = {"last_eval_step": 0, "metrics": {}}
    return content


def begin(world: World, store: LocalStore):
    attempt = world.run_on_rank0(lambda: lineage.begin(store, {}))
    world.run_on_rank0(
        lambda: lineage.amend(store, attempt, {"resumed_from": {"step": 0, "attempt": None}})
    )
    return checkpoint.Writer(store, world, attempt)


def save_with_different_buffers(world: World, folder: str):
    store = LocalStore(folder)
    model = make_model()
    rng.seed_all(100 + world.rank)
    model[-1].running_mean.fill_(float(world.rank + 1))  # as after a step under DDP
    checkpoint.save(begin(world, store), content_of(world, model), step=5)


def load_everything(world: World, folder: str):
    store = LocalStore(folder)
    manifest = checkpoint.latest(store)
    model = make_model()
    for parameter in model.parameters():
        parameter.data.zero_()
    world.run_on_all(lambda: checkpoint.load(store, manifest, state_tree.model_targets(model)))
    same = all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), make_model().parameters(), strict=True)
    )
    return same, model[-1].running_mean.unique().tolist(), manifest.world_size


def test_replicas_are_written_once_and_balanced_and_buffers_are_rank_0s(on_ranks, tmp_path):
    on_ranks(2, save_with_different_buffers, str(tmp_path))
    shards = sorted(tmp_path.glob("checkpoints/step-00000005.0001/*.safetensors"))
    assert len(shards) == 2
    names, parts, sizes = [], [], []
    for shard in shards:
        with safe_open(shard, "pt") as file:
            keys = [key for key in file.keys() if key not in RESERVED]  # noqa: SIM118
            names += [key for key in keys if "@" not in key]
            parts += [key for key in keys if "@" in key]
            sizes.append(sum(file.get_tensor(key).nbytes for key in keys))
    assert len(names) == len(set(names))
    assert [name.partition("@")[0] for name in sorted(parts)] == ["model.0.weight"] * 2  # is large
    assert {name.removeprefix("model.") for name in names if name.startswith("model.")} == set(
        make_model().state_dict()
    ) - {"0.weight"}
    assert {name.split(".")[1] for name in names if name.startswith("rng.")} == {"0", "1"}
    assert max(sizes) < 1.02 * min(sizes)
    for size in (1, 3):
        for answer in on_ranks(size, load_everything, str(tmp_path)):
            assert answer == (True, [1.0], 2)


class FailingStore(LocalStore):
    """The real store, but rank 1's shard of the second save cannot be written."""

    def write(self, key, total_bytes, parts):
        if "r00001-of" in key and key.endswith("-2.safetensors"):
            raise StoreError("no space left")
        super().write(key, total_bytes, parts)


def save_then_fail(world: World, folder: str):
    model = make_model()
    writer = begin(world, FailingStore(folder))
    checkpoint.save(writer, content_of(world, model), step=5)
    try:
        checkpoint.save(writer, content_of(world, model), step=6)
    except StoreError as error:
        return str(error)
    return "saved"


def test_failure_on_one_rank_aborts_all_and_keeps_previous_checkpoint(on_ranks, tmp_path):
    assert on_ranks(2, save_then_fail, str(tmp_path)) == ["rank 1: no space left"] * 2
    store = LocalStore(tmp_path)
    manifest = checkpoint.latest(store)
    assert manifest.step == 5
    checkpoint.verify(store, manifest)
    assert list(tmp_path.glob("checkpoints/step-00000006*/*.safetensors")) == []


def plan_is_kept(world: World, folder: str):
    store, model = LocalStore(folder), make_model()
    writer = begin(world, store)
    plans = []
    for step in (1, 2):
        checkpoint.save(writer, content_of(world, model), step=step)
        plans.append(writer._plan)
    model.register_parameter("late", nn.Parameter(torch.ones(3)))
    checkpoint.save(writer, content_of(world, model), step=3)
    return plans[0] is plans[1], writer._plan is plans[0]


def test_plan_is_reused_until_layout_changes(on_ranks, tmp_path):
    assert on_ranks(2, plan_is_kept, str(tmp_path)) == [(True, False)] * 2
    manifest = json.loads(
        next(tmp_path.glob("checkpoints/step-00000003.*/manifest.json")).read_text()
    )
    assert "model.late" in manifest["tensors"]


def bring_different_tensors(world: World, folder: str):
    model = make_model()
    writer = begin(world, LocalStore(folder))
    checkpoint.save(writer, content_of(world, model), step=1)
    if world.rank == 1:
        model.register_parameter("late", nn.Parameter(torch.ones(3)))
    try:
        checkpoint.save(writer, content_of(world, model), step=2)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_tensors_that_only_some_ranks_bring_are_named_on_every_rank(on_ranks, tmp_path):
    for answer in on_ranks(2, bring_different_tensors, str(tmp_path)):
        assert "ranks 0 and 1 have different tensors" in answer
        assert "model.late" in answer
    assert checkpoint.latest(LocalStore(tmp_path)).step == 1
