"""Results and errors reach every rank; one rank's signal stops all."""

import os
import signal
from types import SimpleNamespace

from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.errors import CheckpointError, DataError


def answers_and_errors(world: World):
    results = [world.run_on_rank0(lambda: world.rank + 10), world.gather(world.rank)]

    def fail_on_1():
        if world.rank == 1:
            raise CheckpointError("disk full")
        return world.rank

    def fail():
        raise DataError("no data")

    calls = [
        lambda: world.run_on_all(fail_on_1),
        lambda: world.run_on_rank0(fail),
        lambda: world.run_on_all(fail),
    ]
    for call in calls:
        try:
            call()
        except (CheckpointError, DataError) as error:
            results.append((type(error).__name__, str(error), error.agreed))
    try:
        world.run_on_all(lambda: 1 / world.rank)
    except RuntimeError as error:
        results.append("ZeroDivisionError" in str(error))
    results.append(world.gather_results(lambda: world.rank * 2))
    return results


def test_results_and_errors_are_equal_on_every_rank(on_ranks):
    first, second = on_ranks(2, answers_and_errors)
    assert first == second == [
        10,
        [0, 1],
        ("CheckpointError", "rank 1: disk full", True),
        ("DataError", "no data", True),
        ("DataError", "no data", True),
        True,
        [0, 2],
    ]  # fmt: skip


def stop_at(world: World, rank: int, boundary: int):
    """Pass 12 step boundaries; one rank receives a signal before one of them."""
    stop = Stop(world)
    stop.listen(["SIGUSR1", "SIGTERM"])
    saves = SimpleNamespace(  # only rank 0's clock is used
        reserve_s=0.0, due_by_clock=lambda: world.rank == 1, ended=lambda: 0
    )
    count = 0
    for step in range(12):
        if (world.rank, step) == (rank, boundary):
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
        count += stop.agree(saves=saves).save_due
        if stop.reason:
            break
    stop.settle()
    stop.restore_handlers()
    return step, stop.reason, count


def test_stop_signal_on_one_rank_stops_all_at_same_step(on_ranks):
    for rank, boundary, stops_at in ((0, 0, 0), (1, 0, 0), (0, 3, 4), (1, 5, 6)):
        answers = on_ranks(2, stop_at, rank, boundary)
        assert answers == [(stops_at, signal.SIGUSR1, 0)] * 2
