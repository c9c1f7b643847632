"""Shards of given tensors, written as a rank writes its own."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from trainer.checkpoint import shard
from trainer.checkpoint.box import Box
from trainer.checkpoint.plan import DTYPE_NAMES, Plan
from trainer.checkpoint.shard_writer import write_shard
from trainer.checkpoint.snapshot import Snapshot
from trainer.storage import Store

SAMPLE = {
    "model.weight": np.arange(6, dtype="<f4").reshape(2, 3),
    "model.bias": np.array([-1.5, 2.5], dtype="<f4"),
    "moment@0,2": np.array([[1], [-2]], dtype="<i8"),
    "flags": np.array([True, False, True]),
    "rng.0.torch": np.arange(5, dtype="u1"),
    "step": np.array(7, dtype="<f4"),
    "nothing": np.zeros((0, 4), dtype="<f8"),
    "naïve": np.array([1 + 2j], dtype="<c16"),
}
"""Tensors of every item size, by key."""


def write_tensors(
    store: Store, key: str, tensors: Mapping[str, Tensor], snapshot: Snapshot | None = None
) -> tuple[shard.Layout, Any]:
    """Write a shard that holds `tensors` under their names; return its layout and record."""
    snapshot = snapshot or Snapshot()
    layout = shard.lay_out(
        (name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
        if tensor.numel()
    )
    sources = {name: (name, Box.full(t.shape)) for name, t in tensors.items()}
    snapshot.start(Plan([], layout, sources, {}), tensors, deferrable=tensors)
    return layout, write_shard(store, key, layout, snapshot)
