"""Votes of several processes, each way that they travel, against what they must add up to."""

import os
import random
from dataclasses import replace

import pytest

from trainer.cluster import agreement
from trainer.cluster.world import World
from trainer.cluster.agreement import RankEndedError, Vote

SIZE = 3


def cast(rank: int, number: int) -> Vote:
    lot = random.Random(1000 * number + rank)
    reason = lot.choice([0, 0, 0, 10, 15, 1000])
    return Vote(reason, lot.random() < 0.3, lot.choice([0, 7, 2**30 - 1]), lot.random() < 0.8)


def together(number: int) -> Vote:
    each = [cast(rank, number) for rank in range(SIZE)]
    return Vote(
        max(vote.reason for vote in each),
        any(vote.save_due for vote in each),
        min(vote.saves_ended for vote in each),
        all(vote.ready for vote in each),
    )


def vote_often(world: World, one_machine: bool):
    way = agreement.between(world if one_machine else replace(world, local_size=1))
    if one_machine:
        way._number = 2**20 - 500  # the number of a vote begins anew
    lot, heard = random.Random(world.rank), []
    for number in range(1000):
        way.send(cast(world.rank, number))
        sum(range(lot.choice([1, 10, 10_000])))  # now this rank is ahead, now that
        heard.append(way.take())
    return type(way).__name__, heard


@pytest.mark.parametrize(("one_machine", "way"), [(True, "_Board"), (False, "_Reduction")])
def test_every_rank_hears_the_same_and_nothing_of_another_vote(on_ranks, one_machine, way):
    expected = [together(number) for number in range(1000)]
    assert on_ranks(SIZE, vote_often, one_machine) == [(way, expected)] * SIZE


def vote_until_one_dies(world: World):
    way, heard = agreement.between(world), []
    for number in range(4):
        way.send(Vote(saves_ended=number))
        if (world.rank, number) == (1, 2):
            os._exit(0)
        try:
            heard.append(way.take().saves_ended)
        except RankEndedError as error:
            heard.append(str(error))
            break
    return heard


def test_the_vote_of_a_rank_that_ended_is_not_waited_for(on_ranks):
    first, _, third = on_ranks(SIZE, vote_until_one_dies, dying=(1,))
    assert first == third == [0, 1, 2, "the process of rank 1 has ended"]
