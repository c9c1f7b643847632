"""State of a resume or a fork, against values by hand."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.loop_jobs import DATA, Net, a_job, a_saver

from trainer.checkpoint.replicas import Replicas
from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.config.schema import Run
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.data.source import TrainStream
from trainer.errors import ConfigError
from trainer.storage import open_store
from trainer.training import build, loop, resume

STEPS = 4
SCHEDULERS = {
    "constant": {},
    "step": {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 2},
    "cosine": {"_target_": "trainer.schedule.warmup_cosine", "total_steps": "total_steps"},
}


def config(**changes):
    """Return a stored configuration of AdamW with two parameter groups."""
    optimizer = {"_target_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.05}
    optimizer["groups"] = [{"names": ["*.bias"], "weight_decay": changes.pop("bias_decay", 0.0)}]
    for key in ("lr", "weight_decay"):
        optimizer[key] = changes.pop(key, optimizer[key])
    scheduler = SCHEDULERS[changes.pop("scheduler", "constant")]
    return {"optimizer": optimizer, "scheduler": scheduler, "trainer": {}, **changes}


def job_of(stored, max_steps, freeze=()):
    """Build a job as build.py does from this configuration."""
    torch.manual_seed(0)
    model = Net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in freeze)
    run = Run(name="a", run_dir="a", **{k: stored[k] for k in ("optimizer", "scheduler")})
    task = a_job().task
    phases, _ = build.build_phases(run, World(), model, task, max_steps, 5)
    job = a_job(model=model, max_steps=max_steps)
    job.phases = phases
    return job


def trained(folder, stored):
    job = job_of(stored, STEPS)
    loop.train(job, State(), a_saver(folder, config=stored), Stop(World()))
    return job


def started(folder, stored, max_steps=12, *, is_fork, override=(), freeze=()):
    """Load the checkpoint in `folder` as a resume or a fork with this configuration."""
    where = (
        {"run_dir": f"{folder}-fork", "resume": str(folder)}
        if is_fork
        else {"run_dir": str(folder)}
    )
    run = Run(name="b", resume_override=list(override), **where)
    start = resume.choose(Replicas(open_store(run.run_dir)), run, stored)
    job = job_of(stored, max_steps, freeze)
    return job, resume.load(job, start)


def rates(job, count):
    """Return the learning rate of the next steps."""
    (phase,), values = job.phases, []
    for _ in range(count):
        values.append(phase.optimizer.param_groups[0]["lr"])
        phase.optimizer.step()
        if phase.scheduler is not None:
            phase.scheduler.step()
    return values


def by_hand(kind, lr, first, last, count):
    """Return the learning rates of a schedule after `first` of its `last` steps."""
    factors = {
        "constant": lambda step: 1.0,
        "step": lambda step: 0.1 ** (step // 2),
        "cosine": lambda step: 0.5 * (1 + math.cos(math.pi * min(step / last, 1))),
    }
    return [lr * factors[kind](step) for step in range(first, first + count)]


KINDS = st.sampled_from(sorted(SCHEDULERS))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    old_kind=KINDS, kind=KINDS, lr=st.sampled_from([0.1, 0.02]), decay=st.sampled_from([0.05, 0.3]),
    bias_decay=st.sampled_from([0.0, 0.02]), is_fork=st.booleans(),
)  # fmt: skip
def test_start_equals_schedule_and_groups_by_hand(
    tmp_path_factory, old_kind, kind, lr, decay, bias_decay, is_fork
):
    folder = tmp_path_factory.mktemp("run") / "a"
    trained(folder, config(scheduler=old_kind))
    new = config(scheduler=kind, lr=lr, weight_decay=decay, bias_decay=bias_decay)
    new["trainer"] = {"max_steps": 12}
    override = () if is_fork else ("optimizer", "scheduler")
    job, state = started(folder, new, is_fork=is_fork, override=override)
    assert state.step == STEPS
    groups = job.phases[0].optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [decay, bias_decay]
    starts_over = kind != old_kind or (is_fork and lr != 0.1)
    first, last = (0, 12 - STEPS) if starts_over else (STEPS, 12)
    assert rates(job, 8) == pytest.approx(by_hand(kind, lr, first, last, 8), abs=1e-12)


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
