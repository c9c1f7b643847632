"""Every strategy x precision x extra: a step equals the step by hand, and a resume is exact.

Two ranks can equal one process bit for bit: the sum of two addends has one value in either order,
and halving is exact. Only the norm by which FSDP2 clips is added up in another order.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from support import step_matrix
from support.ranks import free_ports, joined
from support.step_matrix import EXTRAS, Case

from trainer.cluster.world import World

ROUNDING = 2**-20
"""Tolerance relative to the largest element, of 24-bit mantissas. Causes: the summation order of a
norm, and a vectorised root that starts at another element."""
HALF = 2**-5
"""Tolerance relative to the largest element: 8 bits, a few operations per step, three steps."""
MOVED = Case("ddp", "fp16", EXTRAS)
"""Case saved under one strategy and loaded under another, with every kind of tensor."""


pytestmark = pytest.mark.usefixtures("one_thread")


def run_cases(world, folder, cases):
    """Return for each case three steps, and the names that differ between a resume and no stop."""
    return [
        (step_matrix.steps(world, case), resume_differences(world, f"{folder}/{case}", case))
        for case in cases
    ]


def resume_differences(world, folder, case):
    uninterrupted = step_matrix.everything(
        *step_matrix.train(world, case, f"{folder}/uninterrupted", 5)
    )
    step_matrix.train(world, case, f"{folder}/interrupted", 2)
    job, state = step_matrix.train(world, case, f"{folder}/interrupted", 5)
    assert state.step == 5
    interrupted = step_matrix.everything(job, state)
    assert uninterrupted.keys() == interrupted.keys()
    return [name for name in uninterrupted if uninterrupted[name] != interrupted[name]]


def assert_steps_equal(actual, expected, tolerance=0.0):
    """Compare losses, applied updates, and tensors by name, relative to each largest element."""
    losses, applied, tensors = actual
    expected_losses, expected_applied, expected_tensors = expected
    assert applied == expected_applied
    np.testing.assert_allclose(losses, expected_losses, rtol=tolerance)
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        atol = tolerance * np.abs(tensor).max()
        np.testing.assert_allclose(tensors[name], tensor, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("case", step_matrix.cases("single"), ids=str)
def test_single_process_steps_match_steps_by_hand_and_resume_is_exact(tmp_path, case):
    ((actual, changed),) = run_cases(World(), tmp_path, [case])
    assert_steps_equal(actual, step_matrix.steps_by_hand(case, 1))
    assert changed == []


def check_answers(cases, answers):
    """Compare one rank's answers with the steps by hand, each within its case's tolerance."""
    assert len(cases) == len(answers)
    for case, (actual, changed) in zip(cases, answers, strict=True):
        sharded = case.strategy == "fsdp"
        tolerance = ROUNDING if sharded and ("clip" in case.extras or case.fused) else 0.0
        if case.param_dtype != case.precision and case.param_dtype != "fp32":
            tolerance = HALF
        assert_steps_equal(actual, step_matrix.steps_by_hand(case, 2), tolerance)
        assert changed == [], case


def on_two(world, folder, cases):
    answers = run_cases(world, f"{folder}/cases", cases)
    save_each(world, f"{folder}/moved")
    assert load_each(world, f"{folder}/moved") == 4
    return answers


def test_two_ranks_match_steps_by_hand_and_load_runs_of_other_strategies(on_ranks, tmp_path):
    cases = step_matrix.cases("ddp", "fsdp", extras=[(), EXTRAS])
    cases += [Case("fsdp", "fp16", extras, bursts=True) for extras in [(), EXTRAS]]
    for answers in on_ranks(2, on_two, str(tmp_path), cases):
        check_answers(cases, answers)


@pytest.mark.slow
def test_two_ranks_match_steps_by_hand_in_all_other_cases(on_ranks, tmp_path):
    subsets = [extras for extras in step_matrix.subsets() if extras not in [(), EXTRAS]]
    cases = step_matrix.cases("ddp", "fsdp", extras=subsets)
    for strategy, precision in product(["ddp", "fsdp"], ["fp32", "fp16"]):
        cases.append(Case(strategy, precision, EXTRAS, bursts=True))
        cases.append(Case(strategy, precision, bursts=True, fused=True))
    for precision, half in [("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16")]:
        cases += [Case("fsdp", precision, extras, half) for extras in [(), EXTRAS]]
    for answers in on_ranks(2, run_cases, str(tmp_path), cases, timeout_s=500):
        check_answers(cases, answers)


# --- m -> n --------------------------------------------------------------------------------------


STRATEGIES = {1: ["single", "ddp", "fsdp"], 2: ["ddp", "fsdp"], 3: ["ddp", "fsdp"]}


def save_each(world, folder):
    """Save a run under each strategy, and next to it its state and unsharded tensors."""
    for strategy in STRATEGIES[world.size]:
        run_dir = Path(folder, f"{strategy}-{world.size}")
        job, state = step_matrix.train(world, replace(MOVED, strategy=strategy), run_dir, 4)
        assert state.step == 4
        tensors = step_matrix.full_tensors(job, state)
        if world.rank == 0:
            np.savez(run_dir / "tensors.npz", **tensors)
            (run_dir / "state.txt").write_text(repr(state))


def load_each(world, folder):
    """Load every saved run under each strategy; return the number of loads."""
    run_dirs = world.run_on_rank0(lambda: sorted(Path(folder).iterdir()))
    for strategy, run_dir in product(STRATEGIES[world.size], run_dirs):
        job, state = step_matrix.load(world, replace(MOVED, strategy=strategy), run_dir)
        assert repr(state) == (run_dir / "state.txt").read_text()
        tensors, expected = step_matrix.full_tensors(job, state), np.load(run_dir / "tensors.npz")
        assert sorted(tensors) == sorted(expected)
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, expected[name], f"{run_dir} {world} {name}")
    return len(STRATEGIES[world.size]) * len(run_dirs)


def save_and_load(world, folder, ports):
    """Save with three, two and one ranks, then load with three, two and one; return the loads."""
    rank, sizes, loads = world.rank, range(world.size, 0, -1), 0
    for work, size, port in zip(
        [save_each] * 3 + [load_each] * 3, [*sizes, *sizes], ports, strict=True
    ):
        here = joined(rank, size, port)
        loads += (work(here, folder) or 0) if here is not None else 0
    return loads


@pytest.mark.slow
def test_checkpoint_loads_at_any_world_size_and_strategy(on_ranks, tmp_path):
    assert on_ranks(3, save_and_load, str(tmp_path), free_ports(6)) == [7 * 7, 7 * 4, 7 * 2]
