"""State of a resume or a fork, against values by hand."""

import math
from functools import cache
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.loop_jobs import DATA, Net, a_job, a_saver
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainer.checkpoint.replicas import Replicas
from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.config.schema import Checkpoint, Run, Trainer
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.data.source import TrainStream
from trainer.errors import ConfigError
from trainer.storage import open_store
from trainer.task import Classification
from trainer.training import build, loop, metric_setup, resume

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4
EVALUATION_STEPS = 2
SCHEDULERS = {
    "constant": {},
    "step": {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 2},
    "cosine": {"_target_": "trainer.schedule.warmup_cosine", "total_steps": "total_steps"},
    "one_cycle": {
        "_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.3,
        "total_steps": "total_steps",
    },
    "plateau": {
        "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau", "patience": 0, "factor": 0.5,
        "threshold": 0.5,
    },
}  # fmt: skip


class Alternating(Classification):
    """Trains the first and the last layers in turn."""

    phases: ClassVar = {"first": ["body.0.*", "body.1.*"], "last": "body.4.*"}

    def loss(self, model, batch, phase):
        return super().loss(model, batch)

    def train_metrics(self, outputs, batch, phase):
        return super().train_metrics(outputs, batch)

    def update(self, metrics, outputs, batch, phase):
        super().update(metrics, outputs, batch)


def config(**changes):
    """Return a stored configuration of AdamW with two parameter groups."""
    optimizer = {"_target_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.05}
    optimizer["groups"] = [{"names": ["*.bias"], "weight_decay": changes.pop("bias_decay", 0.0)}]
    for key in ("lr", "weight_decay"):
        optimizer[key] = changes.pop(key, optimizer[key])
    optimizer |= changes.pop("optimizer", {})
    scheduler = SCHEDULERS[changes.pop("scheduler", "constant")]
    return {"optimizer": optimizer, "scheduler": scheduler, "trainer": {}, **changes}


def job_of(stored, max_steps, freeze=(), **changes):
    """Build a job as build.py does from this configuration."""
    torch.manual_seed(0)
    model = Net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in freeze)
    run = Run(name="a", run_dir="a", **{k: stored[k] for k in ("optimizer", "scheduler")})
    job = a_job(model=model, max_steps=max_steps, **changes)
    phases, _ = build.build_phases(run, World(), model, job.task, max_steps, 5)
    job.phases = phases
    return job


def trained(folder, stored):
    job = job_of(stored, STEPS)
    loop.train(job, State(), a_saver(folder, config=stored), Stop(World()))
    return job


def choose(folder, stored, *, is_fork, override=(), **settings):
    """Return the configuration of a resume or a fork of the run in `folder`, and its start."""
    where = (
        {"run_dir": f"{folder}-fork", "resume": str(folder)}
        if is_fork
        else {"run_dir": str(folder)}
    )
    run = Run(name="b", resume_override=list(override), **where, **settings)
    return run, resume.choose(Replicas(open_store(run.run_dir)), run, stored)


def started(folder, stored, max_steps=12, *, is_fork, override=(), freeze=()):
    """Load the checkpoint in `folder` as a resume or a fork with this configuration."""
    _, start = choose(folder, stored, is_fork=is_fork, override=override)
    job = job_of(stored, max_steps, freeze)
    return job, resume.load(job, start)


def take_step(phase, value=0.0):
    """Take a step of a phase's optimizer and schedule; `value` is an evaluation's result."""
    for group in phase.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    phase.optimizer.step()
    if isinstance(phase.scheduler, ReduceLROnPlateau):
        phase.scheduler.step(value)
    elif phase.scheduler is not None:
        phase.scheduler.step()


def rates(job, count):
    """Return the learning rate of the next steps."""
    (phase,), values = job.phases, []
    for _ in range(count):
        values.append(phase.optimizer.param_groups[0]["lr"])
        take_step(phase)
    return values


def by_hand(kind, lr, first, last, count):
    """Return the learning rates of a schedule after `first` of its `last` steps."""
    factors = {
        "constant": lambda step: 1.0,
        "step": lambda step: 0.1 ** (step // 2),
        "cosine": lambda step: 0.5 * (1 + math.cos(math.pi * min(step / last, 1))),
        "one_cycle": lambda step: 0.3 * cycle(step, last, 1 / 25, 1, 1 / 25e4) / lr,
    }
    return [lr * factors[kind](step) for step in range(first, first + count)]


def cycle(step, last, *values):
    """Return the value of torch's one-cycle schedule, which passes these three along cosines."""
    turn, end = 0.3 * last - 1, last - 1
    if step <= turn:
        (begin, goal), progress = values[:2], step / turn
    else:
        (begin, goal), progress = values[1:], (step - turn) / (end - turn)
    return goal + (begin - goal) * 0.5 * (1 + math.cos(math.pi * progress))


class Plateau:
    """A schedule that halves its rate unless a value is better by half of the best one."""

    def __init__(self, metric):
        self.factor, self.sign = 1.0, 1 if metric == "accuracy" else -1
        self.best = -self.sign * math.inf

    def add(self, value):
        if self.sign * value > self.sign * self.best * (1 + 0.5 * self.sign):
            self.best = value
        else:
            self.factor *= 0.5


OPTIMIZERS = {
    "AdamW": lambda inertia: {"betas": [inertia, 0.95]},
    "SGD": lambda inertia: {"momentum": inertia},
    "RMSprop": lambda inertia: {"momentum": inertia},
}
KINDS = st.sampled_from(sorted(SCHEDULERS))
RATES = st.sampled_from([0.1, 0.02])
INERTIAS = st.sampled_from([0.0, 0.6, 0.8])
METRICS = st.sampled_from([None, "loss", "accuracy"])
PHASES = {"": {}}, {"first": {}, "last": {}}, {"first": {}, "last": {"lr": 0.04}}


def inertia_of(group):
    return group["betas"][0] if "betas" in group else group["momentum"]


@cache
def parent(folder, optimizer, kind, inertia, has_phases, metric, best):
    """Train four steps with two evaluations, once per test; return the configuration, job, state.

    Args:
        folder: of the run.
        optimizer: a key of `OPTIMIZERS`.
        kind: a key of `SCHEDULERS`.
        inertia: momentum, or the first of two betas.
        has_phases: whether it has two optimizers.
        metric: `checkpoint.metric`.
        best: best value of an earlier evaluation, or None.
    """
    stored = config(
        scheduler=kind,
        optimizer={"_target_": f"torch.optim.{optimizer}", **OPTIMIZERS[optimizer](inertia)},
        checkpoint={"metric": metric, "mode": None},
        data={"classes": 3},
    )
    task = Alternating() if has_phases else Classification()
    job = job_of(stored, STEPS, task=task, eval_every=Every(steps=EVALUATION_STEPS), metric=metric)
    metric_setup.set_up(Run(name="a", run_dir="a"), job)
    stored = metric_setup.with_mode(stored, job)
    state = State() if best is None or metric is None else State(best={"value": best, "step": 0})
    loop.train(job, state, a_saver(folder, config=stored), Stop(World()))
    return stored, job, state


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    optimizer=st.sampled_from(sorted(OPTIMIZERS)), kinds=st.one_of(KINDS.map(lambda k: (k, k)),
    st.tuples(KINDS, KINDS)), lr=RATES, decay=st.sampled_from([0.05, 0.3]),
    bias_decay=st.sampled_from([0.0, 0.02]), old_inertia=st.sampled_from([0.0, 0.8]),
    inertia=INERTIAS, phases=st.sampled_from(PHASES), old_metric=METRICS, metric=METRICS,
    best=st.sampled_from([None, 0.0]), has_other_data=st.booleans(),
    patience=st.sampled_from([None, 1, 2, 3]), is_fork=st.booleans(),
)  # fmt: skip
def test_start_equals_state_by_hand(
    tmp_path_factory, optimizer, kinds, lr, decay, bias_decay, old_inertia, inertia, phases,
    old_metric, metric, best, has_other_data, patience, is_fork,
):  # fmt: skip
    old_kind, kind = kinds
    has_phases, has_other_data = "" not in phases, is_fork and has_other_data
    key = (optimizer, old_kind, old_inertia, has_phases, old_metric, best)
    folder = tmp_path_factory.getbasetemp() / "takeover" / "-".join(map(str, key))
    stored, old_job, old_state = parent(folder, *key)
    new = config(
        scheduler=kind, lr=lr, weight_decay=decay, bias_decay=bias_decay,
        optimizer={"_target_": stored["optimizer"]["_target_"], **OPTIMIZERS[optimizer](inertia)},
        checkpoint={"metric": metric, "mode": None}, data={"classes": 4 if has_other_data else 3},
        trainer={"max_steps": 12},
    )  # fmt: skip
    if has_phases:
        new["optimizer"]["phases"] = phases
    override = () if is_fork else ("optimizer", "scheduler")
    job = job_of(new, 12, task=old_job.task, patience_evals=patience, metric=metric)
    metric_setup.set_up(Run(name="b", run_dir="b"), job)
    new = metric_setup.with_mode(new, job)
    run, start = choose(
        folder, new, is_fork=is_fork, override=override,
        trainer=Trainer(max_steps=12, patience_evals=patience),
        checkpoint=Checkpoint(metric=metric),
    )  # fmt: skip
    has_buffer = old_inertia > 0 or old_kind == "one_cycle"
    if optimizer == "RMSprop" and not has_buffer and (inertia > 0 or kind == "one_cycle"):
        with pytest.raises(ConfigError, match=r"changed, .*RMSprop .*'momentum_buffer'"):
            resume.load(job, start)
        return
    state = resume.load(job, start)

    # Evaluations and patience.
    evaluations = [line[old_metric or "loss"] for line in old_job.tracker.of("eval")]
    keeps_best = not is_fork and metric == old_metric
    stored_best = (old_state.best, old_state.stale_evals) if keeps_best else (None, 0)
    assert (state.step, state.best, state.stale_evals) == (STEPS, *stored_best)
    assert state.last_eval_step == (0 if has_other_data else STEPS)
    is_over = patience is not None and stored_best[1] >= patience
    assert (job.is_over(state), resume.finished(run, start)) == (is_over, is_over and not is_fork)

    # Optimizer state, settings of groups and schedules.
    plateau = Plateau(old_metric)
    live = {id(parameter): name for name, parameter in job.model.named_parameters()}
    old = dict(old_job.model.named_parameters())
    for value in evaluations:
        plateau.add(value)
    restarted = []
    for phase, old_phase in zip(job.phases, old_job.phases, strict=True):
        for parameter, values in phase.optimizer.state.items():
            old_values = old_phase.optimizer.state[old[live[id(parameter)]]]
            assert values.keys() == {k for k, v in old_values.items() if v is not None}
            assert all(torch.equal(torch.as_tensor(values[k]), torch.as_tensor(old_values[k]))
                       for k in values)  # fmt: skip
        groups = phase.optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [decay, bias_decay]
        phase_lr = phases[phase.name].get("lr", lr)
        starts_over = kind != old_kind or (is_fork and phase_lr != 0.1)
        restarted += [phase.name] if starts_over else []
        first, last = (0, 12 - STEPS) if starts_over else (STEPS, 12)
        after, current = [0.4, 0.4, 0.1, 0.3, 0.01, 0.1, 0.1, 0.1], Plateau(metric)
        if not starts_over:
            current.factor = plateau.factor
            if (metric or "loss") == (old_metric or "loss") and not has_other_data:
                current.best = plateau.best
        expected = [] if kind == "plateau" else by_hand(kind, phase_lr, first, last, 8)
        for step, value in enumerate(after):
            if kind == "plateau":
                expected.append(phase_lr * current.factor)
                current.add(value)
            momentum = inertia
            if kind == "one_cycle":
                momentum = cycle(first + step, last, 0.95, 0.85, 0.95)
            for group in groups:
                assert group["lr"] == pytest.approx(expected[step], abs=1e-12)
                assert inertia_of(group) == pytest.approx(momentum, abs=1e-12)
            take_step(phase, value)
    lines = [line for line in start.takeover.lines() if line.startswith("schedule")]
    names = "" if len(restarted) == len(job.phases) else " of " + ", ".join(restarted)
    assert [line.partition(":")[0] for line in lines] == [f"schedule{names}"] * bool(restarted)


@pytest.mark.parametrize(("floor", "reduced", "scaled"), [
    (0.0, 0.025, 0.01), (0.015, 0.025, 0.015), (0.05, 0.05, 0.04),
])  # fmt: skip
def test_plateau_keeps_its_reductions_above_min_lr_under_another_lr(
    tmp_path, floor, reduced, scaled
):
    stored = config()
    stored["scheduler"] = {**SCHEDULERS["plateau"], "min_lr": floor}
    job = job_of(stored, STEPS, eval_every=Every(steps=EVALUATION_STEPS))
    job.phases[0].scheduler.best = 0.0  # both evaluations halve the rate
    loop.train(job, State(), a_saver(tmp_path / "a", config=stored), Stop(World()))
    assert job.phases[0].optimizer.param_groups[0]["lr"] == pytest.approx(reduced)
    new = {**stored, "optimizer": {**stored["optimizer"], "lr": 0.04}}
    job, _ = started(tmp_path / "a", new, is_fork=False, override=["optimizer"])
    assert job.phases[0].optimizer.param_groups[0]["lr"] == pytest.approx(scaled)


class Renamed(Alternating):
    phases: ClassVar = {"front": Alternating.phases["first"], "last": Alternating.phases["last"]}


def test_fork_with_another_phase_starts_its_schedule_at_this_step(tmp_path):
    stored, _, _ = parent(tmp_path / "a", "SGD", "step", 0.8, True, None, None)
    new = {**stored, "task": {"_target_": "Renamed"}}
    _, start = choose(tmp_path / "a", new, is_fork=True)
    job = job_of(new, 12, task=Renamed())
    resume.load(job, start)
    assert [phase.schedule_start for phase in job.phases] == [STEPS, 0]
    lrs = [phase.optimizer.param_groups[0]["lr"] for phase in job.phases]
    assert lrs == pytest.approx([0.1, 0.1 * 0.1**2])


def test_schedule_of_a_fork_is_the_same_after_its_own_resume(tmp_path):
    trained(tmp_path / "a", config())
    new = config(scheduler="cosine")
    job, state = started(tmp_path / "a", new, is_fork=True)
    job.max_steps = 8
    saver = a_saver(tmp_path / "b", config=new)
    loop.train(job, state, saver, Stop(World()))
    again, state = started(tmp_path / "b", new, is_fork=False)
    assert (state.step, again.phases[0].schedule_start) == (8, STEPS)
    assert rates(again, 4) == pytest.approx(by_hand("cosine", 0.1, 4, 8, 4))


def test_resume_with_changes_is_rejected_with_all_of_them_and_the_override(tmp_path):
    trained(tmp_path / "a", config())
    new = config(lr=0.5, weight_decay=0.3, trainer={"freeze": ["body.0.*"]})
    with pytest.raises(ConfigError) as caught:
        started(tmp_path / "a", new, is_fork=False)
    for text in ("optimizer.lr: 0.1 -> 0.5", "optimizer.weight_decay", "trainer.freeze"):
        assert text in str(caught.value)
    allowed = "resume_override=[optimizer.lr,optimizer.weight_decay,trainer.freeze]"
    assert allowed in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        started(tmp_path / "a", new, is_fork=False, override=["optimizer.lr"])
    assert "optimizer.lr:" not in str(caught.value)
    with pytest.raises(ConfigError, match="'seed' cannot be overridden"):
        started(tmp_path / "a", new, is_fork=False, override=["seed"])
    with pytest.raises(ConfigError, match=r"'optimizer.lrr' is not a setting .*'optimizer.lr'"):
        started(tmp_path / "a", new, is_fork=False, override=["optimizer.lrr"])


@pytest.mark.parametrize("is_fork", [True, False])
def test_newly_trained_parameters_start_with_fresh_optimizer_state(tmp_path, is_fork):
    frozen = config(trainer={"freeze": ["body.0.weight"]})
    job = job_of(frozen, STEPS, ["body.0.weight"])
    loop.train(job, State(), a_saver(tmp_path / "a", config=frozen), Stop(World()))
    new = config(trainer={"freeze": ["body.4.weight"]})
    job, state = started(
        tmp_path / "a", new, is_fork=is_fork, override=["trainer.freeze"], freeze=["body.4.weight"]
    )
    optimizer, net = job.phases[0].optimizer, job.model.body
    assert net[0].weight not in optimizer.state
    assert net[4].weight not in optimizer.state
    assert optimizer.state[net[0].bias]["step"] == STEPS
    loop.train(job, state, a_saver(tmp_path / "c", config=new), Stop(World()))
    assert optimizer.state[net[0].weight]["step"] == 12 - STEPS


@pytest.mark.parametrize(("is_fork", "metric", "keeps"), [
    (False, "loss", True), (False, "accuracy", False), (True, "loss", False),
])  # fmt: skip
def test_best_and_patience_start_over_in_a_fork_or_with_another_metric(
    tmp_path, is_fork, metric, keeps
):
    old, new = (config(checkpoint={"metric": name}) for name in ("loss", metric))
    state = State(best={"value": 0.1, "step": 1}, stale_evals=3)
    job = job_of(old, STEPS)
    loop.train(job, state, a_saver(tmp_path / "a", config=old), Stop(World()))
    _, state = started(tmp_path / "a", new, is_fork=is_fork)
    expected = ({"value": 0.1, "step": 1}, 3) if keeps else (None, 0)
    assert (state.best, state.stale_evals) == expected


def test_resume_path_with_a_step_forks_that_checkpoint(tmp_path):
    stored = config()
    saver = a_saver(tmp_path / "a", every=Every(steps=2), config=stored)
    loop.train(job_of(stored, STEPS), State(), saver, Stop(World()))
    run = Run(name="b", run_dir=str(tmp_path / "b"), resume=f"{tmp_path}/a@2")
    start = resume.choose(Replicas(open_store(run.run_dir)), run, stored)
    assert (start.step, start.is_fork) == (2, True)
    run = Run(name="b", run_dir=str(tmp_path / "b"), resume=f"{tmp_path}/a@3")
    with pytest.raises(
        ConfigError, match=r"^resume=.*/a@3: no checkpoint of that .*available: 2, 4"
    ):
        resume.choose(Replicas(open_store(run.run_dir)), run, stored)


@pytest.mark.parametrize(("batch", "epochs", "limit", "last"), [
    (8, 4, None, 4 * 5),  # the parent's: 5 steps per epoch
    (4, 4, None, 7 + 3 * 10),  # one epoch is complete, three are left
    (16, 4, None, 7 + 3 * 2),
    (16, 1, None, 7),
    (4, 4, 12, 12),
    (16, 4, 100, 7 + 3 * 2),
])  # fmt: skip
def test_fork_with_another_batch_size_trains_the_remaining_epochs(
    batch, epochs, limit, last, tmp_path
):
    old = config(scheduler="cosine", trainer={"global_batch_size": 8, "max_epochs": epochs})
    parent = job_of(old, 7)  # ends in the second epoch
    loop.train(parent, State(), a_saver(tmp_path / "a", config=old), Stop(World()))
    new = config(scheduler="cosine", trainer={"global_batch_size": batch, "max_epochs": epochs})

    def loaded(resume_from):
        run = Run(name="b", run_dir=str(tmp_path / "b"), resume=resume_from)
        start = resume.choose(Replicas(open_store(run.run_dir)), run, new)
        data = TrainStream(DATA.train, World(), 5, batch)
        steps = epochs * data.steps_per_epoch
        job = job_of(new, min(steps, limit or steps))
        job.data, job.max_epochs, job.step_limit = data, epochs, limit
        return job, resume.load(job, start)

    job, state = loaded(str(tmp_path / "a"))
    assert (state.step, job.max_steps, job.is_over(state)) == (7, last, last == 7)
    if last == 7:
        return
    job.max_steps = 9  # as if it were stopped there
    loop.train(job, state, a_saver(tmp_path / "b", config=new), Stop(World()))
    again, state = loaded("auto")
    assert (state.step, again.max_steps) == (9, last)
    assert rates(again, last - 9) == pytest.approx(by_hand("cosine", 0.1, 9, last, last - 9))
