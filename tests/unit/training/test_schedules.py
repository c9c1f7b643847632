"""Every schedule of torch: trained to the end and resumed exactly, or rejected before step 1."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import own_schedulers
from support.killed_jobs import Deadly, resumed_like_undisturbed
from support.loop_jobs import PER_EPOCH, a_job, a_saver, everything, sgd
from torch import nn
from torch.optim import lr_scheduler

from trainer.checkpoint.replicas import Replicas
from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.config.schema import Run
from trainer.core import rng
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.errors import ConfigError
from trainer.storage import open_store
from trainer.task import Classification
from trainer.training import build, loop, optimizers, resume, schedules

pytestmark = pytest.mark.usefixtures("one_thread")

TORCH = "torch.optim.lr_scheduler."
STEPS = 12


def half_life(step: int, steps: float) -> float:
    return 0.5 ** (step / steps)


def table(step: int, factors: list[float]) -> float:
    return factors[step]


def function(name, **arguments):
    return {"_target_": f"{__name__}.{name}", "_partial_": True, **arguments}


def node(name, **arguments):
    return {"_target_": TORCH + name, **arguments}


LINEAR = node("LinearLR", start_factor=0.1, total_iters=4)
COSINE = node("CosineAnnealingLR", T_max="total_steps")
FAMILY = {
    "LambdaLR": node("LambdaLR", lr_lambda=function("half_life", steps=3.0)),
    "MultiplicativeLR": node("MultiplicativeLR", lr_lambda=function("half_life", steps=30.0)),
    "StepLR": node("StepLR", step_size=5),
    "MultiStepLR": node("MultiStepLR", milestones=[2, 7, "total_steps"]),
    "ConstantLR": node("ConstantLR", factor=0.5, total_iters=3),
    "LinearLR": LINEAR,
    "ExponentialLR": node("ExponentialLR", gamma=0.8),
    "SequentialLR": node("SequentialLR", schedulers=[LINEAR, COSINE], milestones=[4]),
    "CosineAnnealingLR": COSINE,
    "ChainedScheduler": node("ChainedScheduler", schedulers=[COSINE, LINEAR]),
    "ReduceLROnPlateau": node("ReduceLROnPlateau", patience=0),
    "CyclicLR": node("CyclicLR", base_lr=0.01, max_lr=0.2, step_size_up=3),
    "CosineAnnealingWarmRestarts": node("CosineAnnealingWarmRestarts", T_0=3, T_mult=2),
    "OneCycleLR": node("OneCycleLR", max_lr=0.3, total_steps="total_steps"),
    "PolynomialLR": node("PolynomialLR", total_iters=8, power=2.0),
    "nested": node(
        "SequentialLR",
        schedulers=[
            node("ChainedScheduler", schedulers=[LINEAR, node("StepLR", step_size=2)]),
            node("OneCycleLR", max_lr=0.3, total_steps="total_steps"),
        ],
        milestones=[5],
    ),
}


def scheduled(node, **changes):
    assert schedules.check(node) == []

    def make(optimizer):
        return schedules.maker(node, optimizer, PER_EPOCH)(STEPS)

    return a_job(schedule=make, max_steps=STEPS, **changes)


def test_family_has_every_scheduler_of_torch():
    assert {*lr_scheduler.__all__} - {"LRScheduler"} <= {*FAMILY}


@pytest.mark.parametrize("name", FAMILY)
def test_train_killed_with_any_schedule_ends_with_the_same_bits(tmp_path, name):
    job = partial(scheduled, FAMILY[name], eval_every=Every(steps=3))
    schedules.check_length(job(), State())
    resumed_like_undisturbed(tmp_path, job, Deadly(8), every=7)


@pytest.mark.parametrize("name", [*FAMILY, "Noisy"])
def test_check_length_leaves_every_schedule_and_generator_unchanged(name):
    job = scheduled(FAMILY.get(name) or custom(name))
    before = everything(job, State())
    schedules.check_length(job, State())
    assert everything(job, State()) == before


@pytest.mark.parametrize(("schedule", "text"), [
    (node("OneCycleLR", max_lr=0.3, total_steps=11), "OneCycleLR ends .* 12 more steps"),
    (node("LambdaLR", lr_lambda=function("table", factors=[1.0] * 12)), "LambdaLR .* IndexError"),
    (
        node("SequentialLR", milestones=[4], schedulers=[
            LINEAR, node("OneCycleLR", max_lr=0.3, total_steps=7),
        ]),
        "SequentialLR ends",
    ),
    (
        node("SequentialLR", milestones=[4], schedulers=[
            LINEAR, node("ChainedScheduler", schedulers=[LINEAR]),
        ]),
        "cannot start a ChainedScheduler later on",
    ),
    (
        node("ChainedScheduler", schedulers=[
            LINEAR, node("OneCycleLR", max_lr=0.3, total_steps=11),
        ]),
        "ChainedScheduler ends",
    ),
])  # fmt: skip
def test_check_length_rejects_a_schedule_that_is_too_short(schedule, text):
    with pytest.raises(ConfigError, match=text):
        schedules.check_length(scheduled(schedule), State())


SHAPES = st.recursive(
    st.one_of(
        st.builds(lambda n: node("OneCycleLR", max_lr=0.3, total_steps=n), st.integers(1, 15)),
        st.just(LINEAR),
        st.builds(lambda n: node("StepLR", step_size=n), st.integers(1, 5)),
    ),
    lambda nodes: st.one_of(
        st.builds(
            lambda a, b, n: node("SequentialLR", schedulers=[a, b], milestones=[n]),
            nodes, nodes, st.integers(1, 14),
        ),
        st.builds(lambda a, b: node("ChainedScheduler", schedulers=[a, b]), nodes, nodes),
    ),
    max_leaves=4,
)  # fmt: skip


def runs(settings, steps, step=0, check=lambda job, state: None):
    """Return whether a schedule can be built, stepped `step` times, checked, and stepped."""
    try:
        job = scheduled(settings)
        (phase,) = job.phases
        for _ in range(step):
            phase.optimizer.step()
            phase.scheduler.step()
        check(job, State(step=step))
        for _ in range(steps - step):
            phase.optimizer.step()
            phase.scheduler.step()
    except (ConfigError, ValueError, NotImplementedError, TypeError):
        return False
    return True


NESTED_SHORT = node(
    "SequentialLR", milestones=[3], schedulers=[
        node("SequentialLR", milestones=[3], schedulers=[
            node("OneCycleLR", max_lr=0.3, total_steps=1), LINEAR,
        ]), LINEAR,
    ],
)  # fmt: skip


@settings(max_examples=30)
@example(schedule=NESTED_SHORT, step=0)
@given(schedule=SHAPES, step=st.integers(0, 6))
def test_check_length_agrees_with_stepping_to_the_end(schedule, step):
    by_hand = runs(schedule, STEPS)
    assert runs(schedule, step, step, schedules.check_length) == by_hand


@pytest.mark.parametrize("max_steps", [9, 10, 12, 14])
@pytest.mark.parametrize("step", [0, 3, 5, 7])
def test_check_length_of_a_schedule_of_epochs_counts_the_remaining_epoch_ends(max_steps, step):
    epochs = max_steps // PER_EPOCH - step // PER_EPOCH
    for total, fits in ((epochs, True), (epochs - 1, False)):
        if total < 1:
            continue
        job = scheduled(
            node("OneCycleLR", max_lr=0.3, total_steps=total), scheduler_interval="epoch"
        )
        job.max_steps = max_steps
        state = State(step=step, cursor={"epoch": step // PER_EPOCH, "batch": step % PER_EPOCH})
        if fits:
            schedules.check_length(job, state)
        else:
            with pytest.raises(ConfigError, match=f"{epochs} more epochs"):
                schedules.check_length(job, state)


# --- trial of a restore ------------------------------------------------------------------------


def custom(name, **arguments):
    return {"_target_": f"{own_schedulers.__name__}.{name}", **arguments}


def in_sequence(schedule):
    return node("SequentialLR", schedulers=[LINEAR, schedule], milestones=[2])


RESTORED = {
    **FAMILY,
    "warmup_cosine": {"_target_": "trainer.schedule.warmup_cosine", "total_steps": "total_steps"},
    **{name: custom(name) for name in ("Counting", "Minimal", "Renamed", "Plain", "Noisy")},
    "in sequence": in_sequence(custom("Counting")),
}
LOST = {
    "Filtered": (custom("Filtered"), "Filtered keeps state in count, which"),
    "Omitted": (custom("Omitted"), "Omitted keeps state in count, which"),
    "NotLoaded": (custom("NotLoaded"), "NotLoaded keeps state in count, which"),
    "later": (custom("Filtered", period=1000), "Filtered keeps state in count, which"),
    "hidden": (custom("hidden"), "hidden keeps state in a variable outside of its attributes"),
    "in sequence": (in_sequence(custom("Filtered")), r"state in _schedulers\[1\]\.count, which"),
    "Stateless": (custom("Stateless"), r"Stateless cannot be saved: its state_dict\(\) fails"),
    "Unstorable": (custom("Unstorable"), "Unstorable cannot be saved: .*handle"),
    "Failing": (custom("Failing"), r"Failing cannot be restored: .*KeyError: 'count'"),
}


def tried(settings, steps=STEPS, model=None):
    """Try a schedule on two groups, as `build_phases` does; return the number of optimizers."""
    model, small_optimizers = model or nn.Linear(2, 2), []
    target = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.02}]

    def small():
        small_optimizers.append(optimizers.small(target, groups))
        return small_optimizers[-1]

    schedules.check_state(settings, small, steps, PER_EPOCH)
    return len(small_optimizers)


@pytest.mark.parametrize("steps", [1, STEPS, 1000])
@pytest.mark.parametrize("name", RESTORED)
def test_check_state_accepts_schedules_that_resume_exactly(name, steps):
    model = nn.Linear(2, 2)
    before = rng.capture()
    assert tried(RESTORED[name], steps, model) >= {1: 2, STEPS: 5, 1000: 3}[steps]
    assert all(torch.equal(before[key], value) for key, value in rng.capture().items())


@pytest.mark.parametrize("name", LOST)
def test_check_state_rejects_lost_state_by_name(name):
    settings, text = LOST[name]
    with pytest.raises(ConfigError, match=text):
        tried(settings)


@pytest.mark.parametrize("name", ["Counting", "Minimal", "Renamed", "Plain", "Noisy"])
def test_train_killed_with_an_accepted_schedule_ends_with_the_same_bits(tmp_path, name):
    resumed_like_undisturbed(tmp_path, partial(scheduled, custom(name)), Deadly(8), every=7)


@pytest.mark.parametrize("name", ["Filtered", "Omitted", "NotLoaded", "hidden"])
def test_train_killed_with_a_rejected_schedule_would_end_with_other_bits(tmp_path, name):
    with pytest.raises(AssertionError):
        resumed_like_undisturbed(tmp_path, partial(scheduled, custom(name)), Deadly(8), every=7)


def test_build_job_rejects_a_schedule_that_loses_state():
    run = Run(
        name="a", run_dir="a", scheduler=custom("Filtered"),
        optimizer={"_target_": "torch.optim.SGD", "lr": 0.1},
    )  # fmt: skip
    model = nn.Linear(2, 2)
    weights = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ConfigError, match="Filtered keeps state in count"):
        build.build_phases(run, World(), model, Classification(), STEPS, PER_EPOCH)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))


# --- checks of a configuration -----------------------------------------------------------------


def test_check_reports_the_key_of_a_nested_mistake():
    schedule = node("SequentialLR", milestones=[4], schedulers=[LINEAR, node("StepLR", size=3)])
    keys = [problem.key for problem in schedules.check(schedule)]
    assert keys == ["scheduler.schedulers[1].size", "scheduler.schedulers[1].step_size"]


def test_check_rejects_an_optimizer_in_the_configuration():
    (problem,) = schedules.check(node("StepLR", step_size=3, optimizer="sgd"))
    assert problem.key == "scheduler.optimizer"


def by_position(o, length: int):
    return lr_scheduler.CosineAnnealingLR(o, length)


def test_maker_passes_the_optimizer_by_position_to_other_functions():
    schedule = {"_target_": f"{__name__}.by_position", "length": "total_steps"}
    assert schedules.check(schedule) == []
    optimizer = sgd(nn.Linear(2, 2))
    scheduler = schedules.maker(schedule, optimizer, PER_EPOCH)(STEPS)
    assert (scheduler.T_max, scheduler.optimizer) == (STEPS, optimizer)


@pytest.mark.parametrize("is_fork", [False, True])
def test_load_counts_the_steps_from_where_the_schedule_starts(tmp_path, is_fork):
    """A schedule of 5 steps is too short for 12, and fits the 5 that a fork at step 7 has left."""
    parent = scheduled({**FAMILY["StepLR"]})
    parent.max_steps = 7
    stored = {"scheduler": FAMILY["StepLR"]}
    loop.train(parent, State(), a_saver(tmp_path / "a", config=stored), Stop(World()))
    short = node("OneCycleLR", max_lr=0.3, total_steps=5)
    job = scheduled(short)
    (phase,) = job.phases
    remake = schedules.maker(short, phase.optimizer, PER_EPOCH)
    job.phases = [replace(phase, make_scheduler=remake)]
    run = Run(name="b", run_dir=str(tmp_path / "b"), resume=str(tmp_path / "a"))
    start = resume.choose(Replicas(open_store(run.run_dir)), run, {"scheduler": short})
    if is_fork:
        assert resume.load(job, start).step == 7
        assert job.phases[0].schedule_start == 7
    else:
        with pytest.raises(ConfigError, match="12 more steps"):
            resume.load(job, resume.Start())
