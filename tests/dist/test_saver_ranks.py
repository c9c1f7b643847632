"""Background saves on several ranks: one rank's failure reaches all ranks at the same step."""

import threading
from functools import partial

import pytest
import torch
from support.faulty_stores import FaultyStore
from support.savers import a_saver_for

from trainer import checkpoint
from trainer.checkpoint import lineage
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.saver import Saver
from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.core.state import State
from trainer.errors import SaveHangsError, StoreError
from trainer.storage import LocalStore


def begin(world: World, store: LocalStore, **settings) -> Saver:
    attempt = world.run_on_rank0(lambda: lineage.begin(store, {}))
    world.run_on_rank0(lambda: lineage.amend(store, attempt, {"resumed_from": {"step": 0}}))
    messages: list[str] = []
    retention = Retention(store, attempt, keep_last=100)
    saver = a_saver_for(store, attempt, world, retention=retention, log=messages.append, **settings)
    saver.messages = messages
    return saver


def content_of(world: World, step: int) -> checkpoint.Content:
    return checkpoint.Content(
        {"w": torch.full((1000,), float(step))},
        {f"own.{world.rank}": torch.tensor([step])},
        objects={"run": State(step=step).state_dict()},
    )


def walk(world: World, saver: Saver, steps, *, due, until=lambda: False):
    """Pass step boundaries as the loop does; return step, type and text of an error, or None."""
    stop = Stop(world)
    for step in steps:
        vote = stop.agree(saves=saver)
        content = partial(content_of, world, step)
        try:
            saver.at_boundary(State(step=step), content, due=due(step), ended=vote.saves_ended)
        except (StoreError, SaveHangsError) as error:
            stop.settle()
            return step, type(error).__name__, str(error)
        if until():  # the same on every rank
            break
    stop.settle()
    return None


def saves_that_overlap(world: World, folder: str):
    store = FaultyStore(folder)
    saver = begin(world, store)
    if world.rank == 1:
        store.hanging = ("finish",)  # a slow disk on this rank only
    assert walk(world, saver, range(1, 50), due=lambda step: True) is None
    ended = saver.ended()
    store.hanging = ()
    store.released.set()
    many = range(50, 1_000_000)
    walk(world, saver, many, due=lambda step: False, until=lambda: saver.committed_step == 1)
    step = 1_000_001  # the save that became due during the first has started
    assert saver.save(State(step=step), partial(content_of, world, step))
    return ended, saver.committed_step


def test_save_due_during_another_save_runs_after_it(on_ranks, tmp_path):
    answers = on_ranks(2, saves_that_overlap, str(tmp_path))
    assert answers == [(0, 1_000_001)] * 2
    store = LocalStore(tmp_path)
    committed_steps = [commit.step for commit in checkpoint.steps(store)]
    assert len(committed_steps) == 3  # the first, the one that became due during it, the last
    assert (committed_steps[0], committed_steps[2]) == (1, 1_000_001)
    for commit in checkpoint.steps(store):
        checkpoint.verify(store, lineage.read_manifest(store, commit))


def one_rank_fails(world: World, folder: str, stop_on_error: bool):
    store = FaultyStore(folder)
    saver = begin(world, store, stop_on_error=stop_on_error)
    assert saver.save(State(step=1), partial(content_of, world, 1))
    if world.rank == 1:
        store.broken = ("put",)
    outcome = walk(world, saver, range(2, 10_000), due=lambda step: step == 2 or not stop_on_error)
    return outcome, saver.committed_step, saver.messages


@pytest.mark.parametrize(("stop_on_error", "messages"), [(True, 0), (False, 2)])
def test_store_failure_on_one_rank_surfaces_at_same_step_on_all(
    on_ranks, tmp_path, stop_on_error, messages
):
    answers = on_ranks(2, one_rank_fails, str(tmp_path), stop_on_error)
    assert answers[0][:2] == answers[1][:2]
    _, kind, text = answers[0][0]
    assert kind == "StoreError"
    assert text.startswith("rank 1: the disk failed in put")
    assert text.count("rank 1") == 1
    assert answers[0][1] == 1
    assert len(answers[0][2]) == messages  # one message on rank 0 per survived failure
    assert answers[1][2] == []
    store = LocalStore(tmp_path)
    assert [commit.step for commit in checkpoint.steps(store)] == [1]
    checkpoint.verify(store, checkpoint.latest(store))
    assert not [
        path for path in tmp_path.glob("checkpoints/*/*.safetensors") if "-1." not in path.name
    ]


def every_call_fails(world: World, folder: str):
    """Let each store call of each rank fail in turn; return each outcome."""
    outcomes = []
    for failing_rank in range(world.size):
        for how in ("before", "torn", "after"):
            for number in range(1, 100):
                store = FaultyStore(f"{folder}/{failing_rank}-{how}-{number}", how=how)
                saver = begin(world, store)
                assert saver.save(State(step=1), partial(content_of, world, 1))
                if world.rank == failing_rank:
                    store.fail_at = len(store.calls) + number
                done = saver.save(State(step=2), partial(content_of, world, 2))
                latest = checkpoint.latest(LocalStore(store.url))
                checkpoint.verify(LocalStore(store.url), latest)
                loaded = {"w": torch.zeros(1000), f"own.{world.rank}": torch.tensor([0])}
                checkpoint.load(LocalStore(store.url), latest, loaded)
                assert loaded["w"].unique().tolist() == [float(latest.step)]
                assert latest.step == 2 or not done
                outcomes.append((failing_rank, how, latest.step, done))
                if not any(world.gather(len(store.calls) >= store.fail_at > 0)):
                    break  # no call is left to fail
    return outcomes


@pytest.mark.slow
def test_newest_checkpoint_is_intact_after_any_failed_store_call(on_ranks, tmp_path):
    first, second = on_ranks(2, every_call_fails, str(tmp_path))
    assert first == second
    for failing_rank in (0, 1):
        for how in ("before", "torn", "after"):
            outcomes = [
                (step, done)
                for rank, kind, step, done in first
                if (rank, kind) == (failing_rank, how)
            ]
            assert outcomes[-1] == (2, True)  # without a fault
            assert sum(not done for _, done in outcomes) >= 3  # open, put, finish
            assert {step for step, done in outcomes if not done} <= {1, 2}


def one_rank_hangs(world: World, folder: str):
    store, now = FaultyStore(folder), [0.0]
    saver = begin(world, store, timeout_s=60.0, clock=lambda: now[0])
    assert saver.save(State(step=1), partial(content_of, world, 1))
    if world.rank == 1:
        store.hanging = ("put",)
    assert walk(world, saver, range(2, 40), due=lambda step: step == 2) is None
    now[0] = 61.0
    outcome = walk(world, saver, range(40, 50), due=lambda step: False)
    store.released.set()
    for thread in threading.enumerate():
        if thread.name == "checkpoint-save":
            thread.join(60)
    return outcome


def test_hanging_save_on_one_rank_ends_attempt_on_all_at_same_step(on_ranks, tmp_path):
    first, second = on_ranks(2, one_rank_hangs, str(tmp_path))
    assert first == second
    assert first[1] == "SaveHangsError"
    assert "the save of step 2 has not ended after 60 s" in first[2]
