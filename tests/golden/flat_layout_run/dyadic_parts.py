"""Model, data and task of a stored run, exact in float64, so that no CPU changes a bit.

Inputs, weights, masks, learning rates and momentum are small multiples of powers of two, and the
loss is linear in the weights. Every sum is exact in any order.
"""

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

from trainer.task import Classification


class Points(torch.utils.data.Dataset):
    """24 samples of 4 small integers (float64), each with one of 4 classes."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        inputs = torch.tensor([(index * (k + 3)) % 7 - 3 for k in range(4)], dtype=torch.float64)
        return inputs, index % 4


class Masked(nn.Module):
    """A linear layer behind a random 0/1 mask, which makes gradients depend on the generator."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        with torch.no_grad():
            self.linear.weight.copy_(torch.arange(-8.0, 8.0).reshape(4, 4) / 8)
            self.linear.bias.copy_(torch.arange(-2.0, 2.0) / 4)

    def forward(self, inputs):
        if self.training:
            inputs = inputs * torch.randint(0, 2, inputs.shape).double()
        return self.linear(inputs)


class LinearLoss(Classification):
    """Mean of the outputs, negated for the labelled class; SIGKILL at step KILL_AT, if set."""

    steps = 0

    def loss(self, model, batch):
        inputs, labels = batch
        if model.training:
            self.steps += 1
            if self.steps == int(os.environ.get("KILL_AT", "0")):
                while not list(Path().glob("run/checkpoints/step-00000005.*/manifest.json")):
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
        outputs = model(inputs)
        signs = 1 - 2 * nn.functional.one_hot(labels, 4).double()
        return (outputs * signs).mean(), outputs
