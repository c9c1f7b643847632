"""Shards of given tensors, written as a rank writes its own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trainer.checkpoint import shard
from trainer.checkpoint.box import Box
from trainer.checkpoint.plan import DTYPE_NAMES, Plan
from trainer.checkpoint.shard_writer import write_shard
from trainer.checkpoint.snapshot import Snapshot
from trainer.storage import Store


def write_tensors(
    store: Store, key: str, tensors: Mapping[str, Tensor], snapshot: Snapshot | None = None
) -> tuple[shard.Layout, Any]:
    """Write a shard that holds `tensors` under their names; return its layout and record."""
    snapshot = snapshot or Snapshot()
    layout = shard.lay_out(
        (name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()
    )
    sources = {name: (name, Box.full(t.shape)) for name, t in tensors.items()}
    snapshot.start(Plan([], layout, sources, {}), tensors, deferrable=tensors)
    return layout, write_shard(store.open_new(key, layout.total_bytes), layout, snapshot)
