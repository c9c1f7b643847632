"""Optional members of a task, under their current and former names."""

from types import SimpleNamespace

import pytest
import torch

from trainer.task import Classification
from trainer.training.job import TaskOptions

OUTPUTS, BATCH = torch.eye(3), (torch.zeros(3, 1), torch.tensor([0, 1, 0]))
WARNING = "warning: {}.figures is deprecated; rename it to train_metrics"


class Former(Classification):
    """A task that overrides the former name and calls its base through it."""

    def figures(self, outputs, batch):
        return {**super().figures(outputs, batch), "count": torch.tensor(3.0)}


class Renamed(Former):
    def train_metrics(self, outputs, batch):
        return {"renamed": torch.tensor(1.0)}


@pytest.mark.parametrize(("task", "names", "warnings"), [
    (Classification(), ["accuracy"], ()),
    (Former(), ["accuracy", "count"], (WARNING.format("Former"),)),
    (type("Child", (Former,), {})(), ["accuracy", "count"], (WARNING.format("Child"),)),
    (Renamed(), ["renamed"], ()),
    (SimpleNamespace(), [], ()),
    (SimpleNamespace(train_metrics=lambda *_: {"own": 1}), ["own"], ()),
    (SimpleNamespace(figures=lambda *_: {"own": 1}), ["own"],
     (WARNING.format("SimpleNamespace"),)),
])  # fmt: skip
def test_task_options_accept_the_former_name_of_train_metrics(task, names, warnings):
    options = TaskOptions.of(task)
    assert list(options.train_metrics(OUTPUTS, BATCH)) == names
    assert options.warnings == warnings


def test_task_options_default_to_no_weight_and_one_phase():
    options = TaskOptions.of(SimpleNamespace(phases=None))
    assert (options.weight, options.items, dict(options.phases)) == (None, "items", {})
