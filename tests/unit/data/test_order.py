"""The order of samples: the same on any number of ranks, from any point on."""

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from trainer.cluster.world import World
from trainer.data import order
from trainer.data.source import EvalStream, TrainStream
from trainer.errors import DataError

BEGINNING = {"epoch": 0, "batch": 0}


def batches(count, cursor=BEGINNING, *, seed=0, size=23, global_batch_size=5):
    batches_ = order.global_batches(
        cursor, seed=seed, size=size, global_batch_size=global_batch_size
    )
    return [(indices.tolist(), after) for indices, after in islice(batches_, count)]


def numbers(size):
    """A dataset whose samples are their own indices."""
    return TensorDataset(torch.arange(size))


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 2**40), size=st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_pure_function_of_seed_and_epoch(seed, epoch, size):
    first = order.permutation(seed, epoch, size)
    torch.manual_seed(0)  # independent of the global generators
    torch.rand(3)
    assert torch.equal(order.permutation(seed, epoch, size), first)
    assert sorted(first.tolist()) == list(range(size))


def test_permutations_match_stored_values():
    """A change here changes the order of the data of every run that exists."""
    assert order.permutation(0, 0, 8).tolist() == [7, 1, 2, 3, 4, 0, 6, 5]
    assert order.permutation(7, 3, 8).tolist() == [3, 6, 7, 0, 4, 1, 2, 5]


def test_permutation_differs_between_seeds_and_epochs():
    seen = {tuple(order.permutation(s, e, 40).tolist()) for s in range(5) for e in range(5)}
    assert len(seen) == 25


def test_permutation_does_not_use_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    order.permutation(0, 0, 100)
    batches(12)
    assert torch.equal(torch.get_rng_state(), before)


def test_epoch_has_each_sample_at_most_once_without_the_incomplete_batch():
    epoch = batches(4)
    seen = [index for indices, _ in epoch for index in indices]
    assert len(seen) == len(set(seen)) == 20
    assert seen == order.permutation(0, 0, 23).tolist()[:20]


def test_cursor_after_the_last_batch_is_the_start_of_the_next_epoch():
    cursors = [after for _, after in batches(9)]
    assert cursors == [
        {"epoch": 0, "batch": 1}, {"epoch": 0, "batch": 2}, {"epoch": 0, "batch": 3},
        {"epoch": 1, "batch": 0}, {"epoch": 1, "batch": 1}, {"epoch": 1, "batch": 2},
        {"epoch": 1, "batch": 3}, {"epoch": 2, "batch": 0}, {"epoch": 2, "batch": 1},
    ]  # fmt: skip


@pytest.mark.parametrize("size", [20, 23, 24, 5])
def test_global_batches_from_any_cursor_continue_identically(size):
    reference = batches(13, size=size)
    for at, (_, cursor) in enumerate(reference[:-1]):
        assert batches(13 - at - 1, cursor, size=size) == reference[at + 1 :]


@given(
    world_size=st.integers(1, 9),
    accumulate=st.integers(1, 5),
    size_=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_microbatches_of_all_ranks_form_the_global_batch(world_size, accumulate, size_, epoch):
    size = world_size * accumulate * size_
    indices = order.permutation(1, epoch, size)
    microbatches = [
        order.microbatches(indices, rank=rank, world_size=world_size, accumulate=accumulate)
        for rank in range(world_size)
    ]
    assert {len(pieces) for pieces in microbatches} == {accumulate}
    assert {len(piece) for pieces in microbatches for piece in pieces} == {size_}
    assert torch.equal(torch.cat([torch.cat(pieces) for pieces in microbatches]), indices)


@given(world_size=st.integers(1, 6), accumulate=st.integers(1, 3), steps=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_train_stream_gives_the_same_steps_on_any_number_of_ranks(world_size, accumulate, steps):
    size = world_size * accumulate * 2
    streams = [
        TrainStream(numbers(3 * size + 1), World(rank=rank, size=world_size), 5, size, accumulate)
        for rank in range(world_size)
    ]
    alone = TrainStream(numbers(3 * size + 1), World(), 5, size)
    per_rank = [list(islice(stream.batches(BEGINNING), steps)) for stream in streams]
    for step, (microbatches, cursor) in enumerate(islice(alone.batches(BEGINNING), steps)):
        rows = [mine[step][0] for mine in per_rank]
        together = torch.cat([batch[0] for pieces in rows for batch in pieces])
        assert torch.equal(together, microbatches[0][0])
        assert all(mine[step][1] == cursor for mine in per_rank)


def test_train_stream_resumes_from_its_cursor():
    stream = TrainStream(numbers(23), World(), 3, 5)
    reference = list(islice(stream.batches(BEGINNING), 9))
    rest = list(islice(stream.batches(reference[5][1]), 3))
    assert [batch[0].tolist() for (batch,), _ in rest] == [
        batch[0].tolist() for (batch,), _ in reference[6:]
    ]


def test_steps_per_epoch_matches_the_stream():
    stream = TrainStream(numbers(23), World(), 0, 5)
    cursors = [cursor for _, cursor in islice(stream.batches(BEGINNING), stream.steps_per_epoch)]
    assert cursors[-1] == {"epoch": 1, "batch": 0}
    assert cursors[-2]["epoch"] == 0


def test_train_stream_rejects_data_smaller_than_a_global_batch():
    TrainStream(numbers(5), World(), 0, 5)
    with pytest.raises(DataError, match="4 samples, fewer than one global batch of 5"):
        TrainStream(numbers(4), World(), 0, 5)


@given(size=st.integers(0, 70), world_size=st.integers(1, 9), batch_size=st.integers(1, 12))
@settings(max_examples=120, deadline=None)
def test_eval_stream_covers_every_sample_once_with_equal_counts(size, world_size, batch_size):
    per_rank = [
        list(EvalStream(numbers(size), World(rank=rank, size=world_size), batch_size).batches())
        for rank in range(world_size)
    ]
    assert len({len(yielded) for yielded in per_rank}) == 1
    given_out = [batch[0] for yielded in per_rank for batch in yielded if batch is not None]
    assert all(1 <= len(batch) <= batch_size for batch in given_out)
    assert sorted(index for batch in given_out for index in batch.tolist()) == list(range(size))
