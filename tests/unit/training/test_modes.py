"""Optimizers with a training and an evaluation mode, against loops written by hand."""

from functools import partial

import pytest
import torch
from support.killed_jobs import Deadly, KilledError, resumed_like_undisturbed
from support.loop_jobs import a_job, a_saver, everything
from support.mode_optimizers import Attribute, ScheduleFree
from torch.nn import functional as F

from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.config.schema import Run, Sample, Trainer
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.errors import ConfigError
from trainer.tracking.several import Silent
from trainer.training import build, evaluation, loop, modes
from trainer.training.contents import collect

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "schedule-free": lambda params: ScheduleFree(params, lr=0.1),
    "attribute": lambda params: Attribute(params, lr=0.1, momentum=0.9),
}


def job_of(kind, **changes):
    def optimizer(model):
        optimizer = KINDS[kind](model.parameters())
        optimizer.train()  # as build.py does
        return optimizer

    return a_job(optimizer=optimizer, eval_every=Every(steps=3), **changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deadly", [
    {"call": 8, "training": True}, {"call": 7, "training": False},
])  # fmt: skip
@pytest.mark.parametrize("every", [1, 2])
def test_train_killed_with_modes_ends_with_the_same_bits(tmp_path, kind, deadly, every):
    job = partial(job_of, kind)
    resumed_like_undisturbed(tmp_path, job, Deadly(**deadly), every=every)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_and_checkpoint_use_the_weights_of_the_evaluation_mode(tmp_path, kind):
    job, state = job_of(kind), State()
    loop.train(job, state, a_saver(tmp_path), Stop(World()))
    trained = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    before = everything(job, state)
    metrics = evaluation.evaluate(job, state, Stop(World()))
    content = collect(job, state)
    assert everything(job, state) == before
    assert all(torch.equal(content.tensors[f"model.{name}"], p) for name, p in trained.items())
    job.phases[0].optimizer.eval()  # by hand, without a way back
    job.model.eval()
    inputs, labels = job.evaluation.dataset.tensors
    by_hand = F.cross_entropy(job.model(inputs), labels)
    assert metrics["loss"] == pytest.approx(by_hand.item())
    for name, parameter in job.model.named_parameters():
        assert torch.equal(content.tensors[f"ema.{name}"], parameter)
    assert not torch.equal(job.model.body[4].weight, trained["body.4.weight"])


def test_evaluation_weights_return_exactly_after_an_error():
    job = job_of("schedule-free", max_steps=3)
    before = {name: p.clone() for name, p in job.model.named_parameters()}
    with pytest.raises(KilledError), modes.evaluation_weights(job):
        raise KilledError
    assert all(torch.equal(before[name], p) for name, p in job.model.named_parameters())
    assert job.phases[0].optimizer.param_groups[0]["is_training"]


def configured(**changes):
    target = f"{ScheduleFree.__module__}.ScheduleFree"
    run = Run(
        name="a",
        run_dir="a",
        model={"_target_": "models.mlp.MLP", "input_shape": [4], "hidden": [3], "classes": 3},
        data={
            "_target_": "trainer.data.synthetic.Synthetic", "shape": [4], "classes": 3,
            "train_samples": 20, "eval_samples": 7,
        },
        task={"_target_": "trainer.task.Classification"},
        optimizer={"_target_": target, "lr": 0.1},
        sample=Sample(shape=[4], classes=3),
        trainer=Trainer(max_epochs=1, global_batch_size=6, **changes),
    )  # fmt: skip
    return build.build_job(run, World(), build.build_data(run), Silent())


def test_build_job_puts_optimizers_in_training_mode():
    assert configured().phases[0].optimizer.param_groups[0]["is_training"]


def test_build_job_rejects_moving_averages_of_an_optimizer_with_modes():
    with pytest.raises(ConfigError, match=r"ema_decay=0.9, but .*ScheduleFree averages"):
        configured(ema_decay=0.9)
