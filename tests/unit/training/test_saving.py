"""The saver of a configuration."""

import pytest
from support.loop_jobs import a_job, saved_steps

from trainer.checkpoint import lineage
from trainer.checkpoint.save_settings import SaveTarget
from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.config.schema import Checkpoint, Run
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.storage import open_store
from trainer.training import loop, metric_setup, saving


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("keep_best", "metric"), [(1, "loss"), (1, "accuracy"), (0, "loss")])
def test_build_saver_saves_and_keeps_the_best_evaluation_between_due_saves(
    tmp_path, keep_best, metric
):
    checkpoint = Checkpoint(
        metric=metric, keep_best=keep_best, keep_last=1, every_steps=7, every_epochs=None
    )
    run = Run(name="a", run_dir=str(tmp_path), checkpoint=checkpoint)
    job = a_job(eval_every=Every(steps=3), max_steps=20, metric=metric)
    metric_setup.set_up(run, job)
    store = open_store(run.run_dir)
    attempt = lineage.begin(store, {"resume": "auto"})
    lineage.amend(store, attempt, {"resumed_from": {"step": 0, "attempt": None}})
    target = SaveTarget(store=store, world=World(), attempt=attempt, config={})
    saver = saving.build_saver(run, job, target, grace_s=30.0, mirror=None)
    loop.train(job, state := State(), saver, Stop(World()))
    best = state.best["step"]
    assert best not in (7, 14, 20)  # due, or the last step
    assert saved_steps(tmp_path) == [*[best] * keep_best, 20]
