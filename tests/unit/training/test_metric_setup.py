"""Mode of checkpoint.metric and of plateau schedules, before the first step."""

import pytest
import torchmetrics
from support.loop_jobs import a_job, a_saver
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import regression

from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.config.schema import Checkpoint, Run
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.errors import ConfigError
from trainer.task import Classification
from trainer.training import build, loop, metric_setup

PLATEAU = "torch.optim.lr_scheduler.ReduceLROnPlateau"


class Task(Classification):
    def metrics(self):
        return {
            **super().metrics(),
            "distance": regression.MeanAbsoluteError(),
            "scores": torchmetrics.MetricCollection({"gap": regression.MeanSquaredError()}),
        }

    def update(self, metrics, outputs, batch):
        super().update(metrics, outputs, batch)
        metrics["distance"].update(outputs.argmax(1).float(), batch[1].float())
        metrics["scores"].update(outputs.argmax(1).float(), batch[1].float())


def set_up(metric=None, mode=None, scheduler_mode=None):
    """Return the mode of the metric, and that of a plateau schedule."""
    scheduler = {"_target_": PLATEAU} | ({"mode": scheduler_mode} if scheduler_mode else {})
    run = Run(
        name="a", run_dir="a", scheduler=scheduler, checkpoint=Checkpoint(metric=metric, mode=mode)
    )
    job = a_job(
        task=Task(),
        metric=metric,
        metric_mode=mode,
        schedule=lambda o: ReduceLROnPlateau(o, mode=scheduler_mode or "min"),
    )
    metric_setup.set_up(run, job)
    return job.metric_mode, job.phases[0].scheduler


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("loss", "min"), ("accuracy", "max"), ("distance", "min"), ("scores_gap", "min"),
        (None, "min"),
    ],
)  # fmt: skip
def test_set_up_infers_the_mode_and_plateaus_follow(metric, mode):
    inferred, scheduler = set_up(metric)
    assert inferred == (mode if metric else None)
    assert scheduler.mode == mode
    expected = ReduceLROnPlateau(a_job().phases[0].optimizer, mode=mode)
    assert {**scheduler.state_dict(), "_last_lr": 0} == {**expected.state_dict(), "_last_lr": 0}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"metric": "distance", "mode": "max"}, "checkpoint.mode: 'max' would select the worst"),
        ({"metric": "scores_gap", "mode": "max"}, "a smaller 'scores_gap' is better"),
        ({"metric": "accuracy", "scheduler_mode": "min"}, "scheduler.mode"),
        ({"metric": "distance", "scheduler_mode": "max"}, "scheduler.mode"),
        ({"scheduler_mode": "max"}, "a smaller 'loss' is better"),
        ({"metric": "acuracy"}, "did you mean 'accuracy'"),
    ],
)
def test_set_up_rejects_contradictions_and_unknown_names(settings, text):
    with pytest.raises(ConfigError) as caught:
        set_up(**settings)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("checkpoint", "scheduler", "keys"),
    [
        ({"metric": "loss", "mode": "max"}, {}, ["checkpoint.mode"]),
        ({"metric": "accuracy"}, {"_target_": PLATEAU, "mode": "min"}, ["scheduler.mode"]),
        ({"metric": "fid", "mode": "min"}, {"_target_": PLATEAU, "mode": "max"},
         ["scheduler.mode"]),
        ({"metric": "fid"}, {"_target_": PLATEAU, "mode": "min"}, []),  # unknown until the start
        ({"metric": "loss"}, {"_target_": PLATEAU, "mode": "min"}, []),
    ],
)  # fmt: skip
def test_check_reports_contradictions_by_name(checkpoint, scheduler, keys):
    run = Run(name="a", run_dir="a", checkpoint=Checkpoint(**checkpoint), scheduler=scheduler)
    assert [problem.key for problem in build._check_metric_mode(run)] == keys


def test_with_mode_stores_the_inferred_mode():
    job = a_job(task=Task(), metric="distance")
    metric_setup.set_up(Run(name="a", run_dir="a"), job)
    stored = metric_setup.with_mode({"checkpoint": {"metric": "distance", "mode": None}}, job)
    assert stored["checkpoint"] == {"metric": "distance", "mode": "min"}


def test_train_with_inferred_mode_tracks_the_smallest_loss(tmp_path):
    job = a_job(metric="loss", eval_every=Every(steps=2))
    loop.train(job, state := State(), a_saver(tmp_path), Stop(World()))
    losses = {line["step"]: line["loss"] for line in job.tracker.of("eval")}
    assert state.best["value"] == min(losses.values())
