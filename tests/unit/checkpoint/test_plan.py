"""Division of the state: each element is written once, with balanced bytes per rank."""

import time
from dataclasses import replace
from itertools import product
from math import prod
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.manifests import sample

from trainer.checkpoint import manifest
from trainer.checkpoint.box import Box, any_overlap
from trainer.checkpoint.division import divide
from trainer.checkpoint.dtypes import DTYPES
from trainer.checkpoint.manifest import ShardFile
from trainer.checkpoint.plan import LocalTensor, Spread, assign, make
from trainer.checkpoint.state_tree import Content
from trainer.cluster.world import World
from trainer.errors import CheckpointError

SHAPES = st.lists(st.integers(0, 300), max_size=3)
TENSORS = st.lists(st.tuples(st.sampled_from(["F64", "F32", "BF16", "U8"]), SHAPES), max_size=12)


def items_of(tensors):
    return [(dtype, Box.full(shape)) for dtype, shape in tensors]


def bytes_of(division, items, holders):
    sizes = [0] * holders
    for (dtype, _), parts in zip(items, division, strict=True):
        for holder, box in parts:
            sizes[holder] += box.elements * DTYPES[dtype]
    return sizes


@settings(max_examples=150, deadline=None)
@given(TENSORS, st.lists(st.integers(0, 10_000_000), min_size=1, max_size=8))
@example([("F32", [1, 300, 300])], [0, 0, 0])
@example([("F64", [2, 300, 300])], [0] * 7)
@example([("F32", [])], [0, 0])
@example([], [0, 0, 0])
def test_every_element_is_written_once_and_in_order(tensors, already):
    items = items_of(tensors)
    division = divide(items, already)
    for (_, complete), parts in zip(items, division, strict=True):
        count = np.zeros(complete.lengths, dtype=int)
        for _, box in parts:
            index = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.lengths, strict=True))
            count[index] += 1
        assert (count == 1).all()
    in_order = [holder for parts in division for holder, _ in parts]
    assert in_order == sorted(in_order)
    assert all(0 <= holder < len(already) for holder in in_order)


LARGE = st.lists(
    st.tuples(
        st.sampled_from(["F64", "F32", "BF16", "U8"]),
        st.lists(st.integers(1, 3000), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(LARGE, st.integers(1, 64))
@example([("F32", [1, 50_000_000])], 7)  # one row
@example([("F32", [3, 50_000_000])], 2)  # few rows
@example([("U8", [1 << 30])], 64)
@example([("F32", [768, 50257])] + [("F32", [768, 768])] * 48, 2)
@example([("U8", [48, 579, 48]), ("U8", [579, 1670])], 48)  # 47,936.375 bytes for each
def test_bytes_are_balanced_within_two_percent_with_few_cuts(tensors, holders):
    items = items_of(tensors)
    division = divide(items, [0] * holders)
    sizes = bytes_of(division, items, holders)
    average = sum(sizes) / holders
    slack = max(0.02 * average, 2 << 12) + 1  # quotas are integers
    assert all(abs(size - average) <= slack for size in sizes)
    cuts = sum(len(parts) - 1 for parts in division if parts)
    assert cuts <= (holders - 1) * 5  # a cut in three dimensions leaves up to five pieces


def test_divide_assigns_less_to_loaded_ranks():
    items = items_of([("U8", [10_000_000])])
    for already in ([0, 4_000_000], [9_000_000, 0, 0], [20_000_000, 0], [1, 2, 3]):
        sizes = bytes_of(divide(items, already), items, len(already))
        totals = sorted(a + b for a, b in zip(already, sizes, strict=True))
        busy = [a + b for a, b in zip(already, sizes, strict=True) if b]
        assert sum(sizes) == 10_000_000
        assert max(busy) - min(busy) <= 0.02 * max(totals)
        assert all(a >= max(busy) for a, b in zip(already, sizes, strict=True) if not b)


# --- manifests of large jobs ---------------------------------------------------------------------

RANKS, LAYERS = 512, 1000
KINDS = {
    "attention.wq.weight": (4096, 4096), "attention.wk.weight": (1024, 4096),
    "attention.wv.weight": (1024, 4096), "attention.wo.weight": (4096, 4096),
    "mlp.gate.weight": (14336, 4096), "mlp.up.weight": (14336, 4096),
    "mlp.down.weight": (4096, 14336), "attention_norm.weight": (4096,),
    "mlp_norm.weight": (4096,), "mlp.bias": (14339,),
}  # fmt: skip
"""Shapes of the tensors of a layer; the last is not a multiple of anything."""


def cells(shape, grid):
    """Return the pieces that torch.chunk makes along each axis."""
    axes = []
    for n, pieces in zip(shape, grid, strict=True):
        step = -(-n // pieces)
        axes.append([(at, min(step, n - at)) for at in range(0, n, step)])
    return [Box(tuple(at for at, _ in cell), tuple(n for _, n in cell)) for cell in product(*axes)]


def fully_sharded(shape):
    boxes = cells(shape, (RANKS, *(1,) * (len(shape) - 1)))
    return Spread(tuple(boxes), tuple((rank,) for rank in range(len(boxes))))


def hybrid_sharded(shape):
    """Return 64 replicas of 8 shards each: rank 8 r + s holds shard s."""
    boxes = cells(shape, (8, *(1,) * (len(shape) - 1)))
    holders = [tuple(range(shard, RANKS, 8)) for shard in range(len(boxes))]
    return Spread(tuple(boxes), tuple(holders))


def two_dimensional(shape):
    """Return data parallel rows over tensor parallel columns: (Shard(1), Shard(0)) on 64 x 8."""
    if len(shape) == 1:
        return hybrid_sharded(shape)
    boxes = cells(shape, (8, 64))
    ranks = [(column * 8 + row,) for row in range(8) for column in range(64)]
    return Spread(tuple(boxes), tuple(ranks))


@pytest.mark.parametrize("spread_of", [fully_sharded, hybrid_sharded, two_dimensional])
def test_manifest_of_512_ranks_and_10_000_tensors_with_adam_is_small(spread_of):
    spreads = {(shape, "mesh"): spread_of(shape) for shape in KINDS.values()}
    items = [
        LocalTensor(f"{kind}layers.{layer}.{name}{slot}", "F32", shape, Box.full(shape), "mesh")
        for layer in range(LAYERS)
        for name, shape in KINDS.items()
        for kind, slot in (
            ("model.", ""),
            ("optimizer.", ".exp_avg"),
            ("optimizer.", ".exp_avg_sq"),
        )
    ]
    assert len(items) == 30_000
    entries, mine = {}, {}
    for item, entry, boxes in assign(items, spreads, [0] * RANKS, rank=77):
        entries[item.name], mine[item.name] = entry, boxes
    names = [
        manifest.shard_name(rank=rank, world_size=RANKS, token="0" * 8, save=1)
        for rank in range(RANKS)
    ]
    files = {name: ShardFile(1 << 40, 4096, "0" * 16, "0" * 16) for name in names}
    large = replace(sample(), tensors=entries, files=files, world_size=RANKS)
    data = manifest.to_bytes(large)
    assert len(data) < 10_000_000
    began_s = time.process_time()
    parsed = manifest.from_bytes(data, "large")
    print(f"{len(data):,} bytes, parsed in {time.process_time() - began_s:.2f} s")
    assert parsed == large
    in_file = {key: shape for key, _, shape in manifest.pieces(parsed, 77)}
    planned = {parsed.key(n, box): box.lengths for n in mine for box in mine[n]}
    assert in_file == planned
    rng, rank_of = Random(1), {name: rank for rank, name in enumerate(names)}
    for item in rng.sample(items, 20):  # every element is in one file, of a rank that holds it
        boxes = list(entries[item.name].boxes(names, Box.full(item.shape)))
        assert sum(box.elements for _, box in boxes) == prod(item.shape)
        assert not any_overlap(box for _, box in boxes)
        spread = spreads[item.shape, "mesh"]
        for name, box in rng.sample(boxes, min(20, len(boxes))):
            number = next(n for n, piece in enumerate(spread.boxes) if piece.overlaps(box))
            assert box.intersection(spread.boxes[number]) == box
            assert rank_of[name] in spread.holders[number]


@pytest.mark.parametrize("spread_of", [fully_sharded, hybrid_sharded, two_dimensional])
def test_bytes_of_large_jobs_are_balanced(spread_of):
    spreads = {(shape, "mesh"): spread_of(shape) for shape in KINDS.values()}
    items = [
        LocalTensor(f"{layer}.{name}", "F32", shape, Box.full(shape), "mesh")
        for layer in range(20)
        for name, shape in KINDS.items()
    ]
    written = []
    for rank in range(0, RANKS, 37):
        boxes = [box for _, _, boxes in assign(items, spreads, [0] * RANKS, rank) for box in boxes]
        written.append(4 * sum(box.elements for box in boxes))
    average = 4 * sum(prod(item.shape) for item in items) / RANKS
    assert max(written) < 1.05 * average


# --- tensors that only one rank has --------------------------------------------------------------


def test_rank_local_tensor_with_a_name_of_all_ranks_is_rejected():
    content = Content(tensors={"w": torch.ones(1)}, rank_local={"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match="'w' of one rank has the name of another"):
        make(content, World())
