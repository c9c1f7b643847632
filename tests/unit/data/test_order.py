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
    found = order.global_batches(cursor, seed=seed, size=size, global_batch_size=global_batch_size)
    return [(indices.tolist(), after) for indices, after in islice(found, count)]


def numbers(size):
    """A dataset whose samples are their own indices."""
    return TensorDataset(torch.arange(size))


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 2**40), size=st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_a_permutation_is_a_pure_function_of_seed_and_epoch(seed, epoch, size):
    first = order.permutation(seed, epoch, size)
    torch.manual_seed(0)  # whatever the global generators do
    torch.rand(3)
    assert torch.equal(order.permutation(seed, epoch, size), first)
    assert sorted(first.tolist()) == list(range(size))


def test_permutations_never_change():
    """A change here changes the order of the data of every run that exists."""
    assert order.permutation(0, 0, 8).tolist() == [7, 1, 2, 3, 4, 0, 6, 5]
    assert order.permutation(7, 3, 8).tolist() == [3, 6, 7, 0, 4, 1, 2, 5]


def test_other_seeds_and_epochs_are_other_orders():
    seen = {tuple(order.permutation(s, e, 40).tolist()) for s in range(5) for e in range(5)}
    assert len(seen) == 25


def test_making_an_order_draws_nothing_from_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    order.permutation(0, 0, 100)
    batches(12)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_holds_each_sample_at_most_once_and_drops_the_incomplete_batch():
    epoch = batches(4)
    seen = [index for indices, _ in epoch for index in indices]
    assert len(seen) == len(set(seen)) == 20
    assert seen == order.permutation(0, 0, 23).tolist()[:20]


def test_the_cursor_after_an_epochs_last_batch_is_the_next_epochs_beginning():
    cursors = [after for _, after in batches(9)]
    assert cursors == [
        {"epoch": 0, "batch": 1}, {"epoch": 0, "batch": 2}, {"epoch": 0, "batch": 3},
        {"epoch": 1, "batch": 0}, {"epoch": 1, "batch": 1}, {"epoch": 1, "batch": 2},
        {"epoch": 1, "batch": 3}, {"epoch": 2, "batch": 0}, {"epoch": 2, "batch": 1},
    ]  # fmt: skip


@pytest.mark.parametrize("size", [20, 23, 24, 5])
def test_from_any_cursor_on_the_rest_is_the_same(size):
    whole = batches(13, size=size)
    for at, (_, cursor) in enumerate(whole[:-1]):
        assert batches(13 - at - 1, cursor, size=size) == whole[at + 1 :]


@given(
    world_size=st.integers(1, 9),
    accumulate=st.integers(1, 5),
    share=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_the_shares_of_all_ranks_together_are_the_global_batch(
    world_size, accumulate, share, epoch
):
    size = world_size * accumulate * share
    indices = order.permutation(1, epoch, size)
    microbatches = [
        order.share(indices, rank=rank, world_size=world_size, accumulate=accumulate)
        for rank in range(world_size)
    ]
    assert {len(pieces) for pieces in microbatches} == {accumulate}
    assert {len(piece) for pieces in microbatches for piece in pieces} == {share}
    assert torch.equal(torch.cat([torch.cat(pieces) for pieces in microbatches]), indices)


@given(world_size=st.integers(1, 6), accumulate=st.integers(1, 3), steps=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_a_stream_gives_the_same_samples_in_the_same_steps_on_any_number_of_ranks(
    world_size, accumulate, steps
):
    size = world_size * accumulate * 2
    streams = [
        TrainStream(numbers(3 * size + 1), World(rank=rank, size=world_size), 5, size, accumulate)
        for rank in range(world_size)
    ]
    alone = TrainStream(numbers(3 * size + 1), World(), 5, size)
    per_rank = [list(islice(stream.batches(BEGINNING), steps)) for stream in streams]
    for step, (microbatches, cursor) in enumerate(islice(alone.batches(BEGINNING), steps)):
        taken = [mine[step][0] for mine in per_rank]
        together = torch.cat([batch[0] for pieces in taken for batch in pieces])
        assert torch.equal(together, microbatches[0][0])
        assert all(mine[step][1] == cursor for mine in per_rank)


def test_a_stream_goes_on_from_its_cursor():
    stream = TrainStream(numbers(23), World(), 3, 5)
    whole = list(islice(stream.batches(BEGINNING), 9))
    rest = list(islice(stream.batches(whole[5][1]), 3))
    assert [batch[0].tolist() for (batch,), _ in rest] == [
        batch[0].tolist() for (batch,), _ in whole[6:]
    ]


def test_steps_per_epoch_is_what_the_stream_does():
    stream = TrainStream(numbers(23), World(), 0, 5)
    cursors = [cursor for _, cursor in islice(stream.batches(BEGINNING), stream.steps_per_epoch)]
    assert cursors[-1] == {"epoch": 1, "batch": 0}
    assert cursors[-2]["epoch"] == 0


def test_data_smaller_than_one_global_batch_is_refused():
    TrainStream(numbers(5), World(), 0, 5)
    with pytest.raises(DataError, match="4 samples, fewer than one global batch of 5"):
        TrainStream(numbers(4), World(), 0, 5)


@given(size=st.integers(0, 70), world_size=st.integers(1, 9), batch_size=st.integers(1, 12))
@settings(max_examples=120, deadline=None)
def test_evaluation_covers_every_sample_once_and_all_ranks_yield_equally_often(
    size, world_size, batch_size
):
    per_rank = [
        list(EvalStream(numbers(size), World(rank=rank, size=world_size), batch_size).batches())
        for rank in range(world_size)
    ]
    assert len({len(yielded) for yielded in per_rank}) == 1
    given_out = [batch[0] for yielded in per_rank for batch in yielded if batch is not None]
    assert all(1 <= len(batch) <= batch_size for batch in given_out)
    assert sorted(index for batch in given_out for index in batch.tolist()) == list(range(size))
