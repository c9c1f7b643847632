"""Every strategy x precision x extra: a step is the step by hand; saved, it goes on the same.

Why ranks may equal one process to the last bit: the sum of two addends has one value in either
order, and halving is exact. Only the norm by which FSDP2 clips is added up in another order.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path

from support import step_matrix
import numpy as np
import pytest
import torch
from support.step_matrix import EXTRAS, Case
from support.ranks import free_ports, joined

from trainer.cluster.world import World

ROUNDING = 2**-20
"""Of 24 bits: a norm that is added up in another order, a vectorised root that begins elsewhere."""
HALF = 2**-5
"""Of the largest element: 8 bits in a handful of operations and three steps of them."""
MOVED = Case("ddp", "fp16", EXTRAS)
"""What is saved under one strategy and loaded under another; it has all that a checkpoint has."""


pytestmark = pytest.mark.usefixtures("one_thread")


def taken(world, folder, cases):
    """Return of each case three steps, and what differs after a resume from an undisturbed run."""
    return [(step_matrix.steps(world, case), resumed(world, f"{folder}/{case}", case)) for case in cases]


def resumed(world, folder, case):
    whole = step_matrix.everything(*step_matrix.train(world, case, f"{folder}/whole", 5))
    step_matrix.train(world, case, f"{folder}/broken", 2)
    job, state = step_matrix.train(world, case, f"{folder}/broken", 5)
    assert state.step == 5
    broken = step_matrix.everything(job, state)
    assert whole.keys() == broken.keys()
    return [name for name in whole if whole[name] != broken[name]]


def same(found, expected, tolerance=0.0):
    """Compare losses, which updates were applied, and tensors by name, with their largest."""
    (losses, applied, tensors), (their_losses, their_applied, theirs) = found, expected
    assert applied == their_applied
    np.testing.assert_allclose(losses, their_losses, rtol=tolerance)
    assert tensors.keys() == theirs.keys()
    for name, tensor in theirs.items():
        most = tolerance * np.abs(tensor).max()
        np.testing.assert_allclose(tensors[name], tensor, rtol=0, atol=most, err_msg=name)


@pytest.mark.parametrize("case", step_matrix.cases("single"), ids=str)
def test_one_process(tmp_path, case):
    ((found, changed),) = taken(World(), tmp_path, [case])
    same(found, step_matrix.steps_by_hand(case, 1))
    assert changed == []


def judge(cases, answers):
    """Compare every rank's answers with the steps by hand, each within what the case allows."""
    assert len(cases) == len(answers)
    for case, (found, changed) in zip(cases, answers, strict=True):
        sharded = case.strategy == "fsdp"
        tolerance = ROUNDING if sharded and ("clip" in case.extras or case.fused) else 0.0
        if case.param_dtype != case.precision and case.param_dtype != "fp32":
            tolerance = HALF
        same(found, step_matrix.steps_by_hand(case, 2), tolerance)
        assert changed == [], case


def on_two(world, folder, cases):
    answers = taken(world, f"{folder}/taken", cases)
    save_each(world, f"{folder}/moved")
    assert load_each(world, f"{folder}/moved") == 4
    return answers


def test_two_ranks(on_ranks, tmp_path):
    cases = step_matrix.cases("ddp", "fsdp", extras=[(), EXTRAS])
    cases += [Case("fsdp", "fp16", some, bursts=True) for some in [(), EXTRAS]]
    for answers in on_ranks(2, on_two, str(tmp_path), cases):
        judge(cases, answers)


@pytest.mark.slow
def test_two_ranks_and_all_other_cases(on_ranks, tmp_path):
    some = [extras for extras in step_matrix.subsets() if extras not in [(), EXTRAS]]
    cases = step_matrix.cases("ddp", "fsdp", extras=some)
    for strategy, precision in product(["ddp", "fsdp"], ["fp32", "fp16"]):
        cases.append(Case(strategy, precision, EXTRAS, bursts=True))
        cases.append(Case(strategy, precision, bursts=True, fused=True))
    for precision, half in [("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16")]:
        cases += [Case("fsdp", precision, some, half) for some in [(), EXTRAS]]
    for answers in on_ranks(2, taken, str(tmp_path), cases, timeout_s=500):
        judge(cases, answers)


# --- m -> n --------------------------------------------------------------------------------------


STRATEGIES = {1: ["single", "ddp", "fsdp"], 2: ["ddp", "fsdp"], 3: ["ddp", "fsdp"]}


def save_each(world, folder):
    """Save a run under each strategy, and beside it all of its tensors as they are."""
    for strategy in STRATEGIES[world.size]:
        where = Path(folder, f"{strategy}-{world.size}")
        job, state = step_matrix.train(world, replace(MOVED, strategy=strategy), where, 4)
        assert state.step == 4
        tensors = step_matrix.whole(job, state)
        if world.rank == 0:
            np.savez(where / "whole.npz", **tensors)
            (where / "state.txt").write_text(repr(state))


def load_each(world, folder):
    """Load all that was saved under each strategy; return how many loads that were."""
    places = world.run_on_rank0(lambda: sorted(Path(folder).iterdir()))
    for strategy, where in product(STRATEGIES[world.size], places):
        job, state = step_matrix.load(world, replace(MOVED, strategy=strategy), where)
        assert repr(state) == (where / "state.txt").read_text()
        tensors, expected = step_matrix.whole(job, state), np.load(where / "whole.npz")
        assert sorted(tensors) == sorted(expected)
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, expected[name], f"{where} {world} {name}")
    return len(STRATEGIES[world.size]) * len(places)


def moved(world, folder, ports):
    """Save with all ranks, with two of three, with one; then load with each of these."""
    rank, sizes, loads = world.rank, range(world.size, 0, -1), 0
    for work, size, port in zip([save_each] * 3 + [load_each] * 3, [*sizes, *sizes], ports, strict=True):
        here = joined(rank, size, port)
        loads += (work(here, folder) or 0) if here is not None else 0
    return loads


@pytest.mark.slow
def test_what_any_ranks_saved_any_others_load(on_ranks, tmp_path):
    assert on_ranks(3, moved, str(tmp_path), free_ports(6)) == [7 * 7, 7 * 4, 7 * 2]
