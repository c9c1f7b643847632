"""Division of the state: each element is written once, with balanced bytes per rank."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.checkpoint.box import Box
from trainer.checkpoint.plan import LocalTensor, divide
from trainer.checkpoint.shard import DTYPES

SHAPES = st.lists(st.integers(0, 300), max_size=3)
TENSORS = st.lists(st.tuples(st.sampled_from(["F64", "F32", "BF16", "U8"]), SHAPES), max_size=12)


def items_of(tensors):
    return [
        LocalTensor(f"t{i}", dtype, tuple(shape), Box((0,) * len(shape), tuple(shape)), ())
        for i, (dtype, shape) in enumerate(tensors)
    ]


def bytes_of(division, items, holders):
    sizes = [0] * holders
    for item, parts in zip(items, division, strict=True):
        for holder, box in parts:
            sizes[holder] += box.elements * DTYPES[item.dtype]
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
    for item, parts in zip(items, division, strict=True):
        count = np.zeros(item.shape, dtype=int)
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
