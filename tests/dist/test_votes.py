"""Votes of several processes, through each exchange, against the expected combination."""

import os
import random
from dataclasses import replace

import pytest

from trainer.cluster import agreement
from trainer.cluster.agreement import RankEndedError, Vote
from trainer.cluster.world import World

SIZE = 3


def cast(rank: int, number: int) -> Vote:
    lot = random.Random(1000 * number + rank)
    reason = lot.choice([0, 0, 0, 10, 15, 1000])
    return Vote(reason, lot.random() < 0.3, lot.choice([0, 7, 2**30 - 1]), lot.random() < 0.8)


def combined(number: int) -> Vote:
    votes = [cast(rank, number) for rank in range(SIZE)]
    return Vote(
        max(vote.reason for vote in votes),
        any(vote.save_due for vote in votes),
        min(vote.saves_ended for vote in votes),
        all(vote.ready for vote in votes),
    )


def vote_often(world: World, one_machine: bool):
    exchange = agreement.connect(world if one_machine else replace(world, local_size=1))
    if one_machine:
        exchange._number = 2**20 - 500  # the vote number wraps around
    lot, received = random.Random(world.rank), []
    for number in range(1000):
        exchange.send(cast(world.rank, number))
        sum(range(lot.choice([1, 10, 10_000])))  # the ranks overtake one another
        received.append(exchange.receive())
    return type(exchange).__name__, received


@pytest.mark.parametrize(("one_machine", "exchange"), [(True, "_Board"), (False, "_Reduction")])
def test_votes_are_combined_equally_on_every_rank(on_ranks, one_machine, exchange):
    expected = [combined(number) for number in range(1000)]
    assert on_ranks(SIZE, vote_often, one_machine) == [(exchange, expected)] * SIZE


def vote_until_rank_1_exits(world: World):
    exchange, received = agreement.connect(world), []
    for number in range(4):
        exchange.send(Vote(saves_ended=number))
        if (world.rank, number) == (1, 2):
            os._exit(0)
        try:
            received.append(exchange.receive().saves_ended)
        except RankEndedError as error:
            received.append(str(error))
            break
    return received


def test_receive_after_a_rank_exited_raises_rank_ended(on_ranks):
    first, _, third = on_ranks(SIZE, vote_until_rank_1_exits, dying=(1,))
    assert first == third == [0, 1, 2, "the process of rank 1 has ended"]
