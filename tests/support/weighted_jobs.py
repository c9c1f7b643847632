"""Jobs whose loss is a mean over items, with a different number of items per sample."""

import torch
from support.loop_jobs import a_job
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from trainer.cluster.world import World
from trainer.data.source import EvalStream, TrainStream


class Masked:
    """Squared error over the outputs that a mask selects; their number differs between samples."""

    def loss(self, model, batch):
        inputs, targets, mask = batch
        outputs = model(inputs)
        error = F.mse_loss(outputs, targets, reduction="none") * mask
        return error.sum() / mask.sum().clamp(min=1), outputs

    def weight(self, batch):
        return batch[2].sum()

    def train_metrics(self, outputs, batch):
        return {}

    def metrics(self):
        return {}

    def update(self, metrics, outputs, batch):
        pass


def a_model():
    torch.manual_seed(0)
    return nn.Linear(6, 5).double()


def dataset(size=24, empty=()):
    torch.manual_seed(1)
    mask = (torch.rand(size, 5) < torch.rand(size, 1)).double()
    mask[list(empty)] = 0
    return TensorDataset(torch.randn(size, 6).double(), torch.randn(size, 5).double(), mask)


def masked_job(data, accumulate, world=None):
    world = world or World()
    stream = TrainStream(data, world, 5, 12, accumulate)
    job = a_job(model=a_model(), task=Masked(), data=stream, evaluation=EvalStream(data, world, 5))
    job.world = world
    return job
