"""Evaluations on several ranks against the same evaluation on one."""

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from support.loop_jobs import a_job
from torch.utils.data import TensorDataset
from torchmetrics import classification

from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.core.state import State
from trainer.data.source import EvalStream
from trainer.errors import ConfigError
from trainer.task import Classification
from trainer.training.evaluation import create_metrics, evaluate

SAMPLES = 3
"""Evaluation samples; fewer than four ranks, so that one rank has none."""


class Order(torchmetrics.CatMetric):
    """Position-weighted sum of all values, so that their order counts."""

    def compute(self):
        values = torch.cat(self.value)
        return (values * torch.arange(1, len(values) + 1)).sum()


class Task(Classification):
    """Task whose metrics have list states, one of them only updated on rank 0."""

    def metrics(self):
        scores = torchmetrics.MetricCollection(
            [classification.MulticlassPrecision(3), classification.MulticlassRecall(3)]
        )
        grouped = dist.new_group(backend="gloo") if dist.is_initialized() else None
        return {
            "auroc": classification.MulticlassAUROC(3, thresholds=None),
            "order": Order(),
            "rare": Order(),
            "scores": scores,
            "grouped": torchmetrics.MeanMetric(process_group=grouped, dist_sync_on_step=True),
        }

    def update(self, metrics, outputs, batch):
        probabilities = outputs.softmax(1)
        metrics["auroc"].update(probabilities, batch[1])
        metrics["scores"].update(probabilities, batch[1])
        metrics["order"].update(probabilities[:, 0])
        metrics["grouped"](probabilities[:, 0])
        if (batch[1] == 0).any():
            metrics["rare"].update(probabilities[:, 0])


def evaluated(world):
    data = TensorDataset(
        torch.rand(SAMPLES, 6, generator=torch.Generator().manual_seed(1)), torch.arange(SAMPLES)
    )
    job = a_job(task=Task(), evaluation=EvalStream(data, world, 1))
    job.world = world
    return [evaluate(job, State(), Stop(world)) for _ in range(2)]


@pytest.mark.filterwarnings("ignore")
def test_evaluation_with_list_states_equals_one_rank(on_ranks):
    expected = evaluated(World())
    assert len(expected[0]) == 7
    assert "scores_MulticlassRecall" in expected[0]
    for values in on_ranks(4, evaluated):
        assert values[0] == pytest.approx(expected[0], rel=1e-6)
        assert values == [values[0]] * 2  # a second evaluation starts from empty states


class Counter:
    """Metric without mergeable states."""

    def reset(self):
        self.count = 0

    def compute(self):
        return self.count


def test_metric_without_states_is_rejected_by_name_on_two_ranks():
    class Counting(Classification):
        def metrics(self):
            return {"counted": Counter()}

    job = a_job(task=Counting())
    assert create_metrics(job)["counted"]
    job.metrics, job.world = None, World(size=2)
    with pytest.raises(ConfigError, match=r"'counted' is a Counter, not a torchmetrics\.Metric"):
        create_metrics(job)
