"""The language model's task against definitions written out."""

import math
from types import SimpleNamespace

import pytest
import torch
from support.loop_jobs import a_job
from torch import nn
from torch.utils.data import TensorDataset

from models.gpt import GPT
from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.core.state import State
from trainer.data.source import EvalStream, TrainStream
from trainer.task import LanguageModel
from trainer.training.evaluation import evaluate


def a_batch():
    torch.manual_seed(2)
    targets = torch.randint(0, 7, (4, 5))
    targets[0, 1:] = targets[2] = -100
    return torch.randint(0, 7, (4, 5)), targets


def by_definition(model, batch):
    """Return the sum of -log p over the counted targets, and their number."""
    tokens, targets = batch
    chances = model(tokens).detach().double().softmax(-1)
    total, count = 0.0, 0
    for row in range(4):
        for at in range(5):
            if targets[row, at] >= 0:
                total -= math.log(chances[row, at, targets[row, at]])
                count += 1
    return total, count


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(vocabulary=7, context=5, layers=1, heads=1, width=8).eval()


def test_loss_is_mean_over_counted_targets(model):
    task, batch = LanguageModel(), a_batch()
    total, count = by_definition(model, batch)
    assert task.loss(model, batch)[0].item() == pytest.approx(total / count, rel=1e-6)
    assert task.weight(batch) == count == 11


def test_bits_per_byte_are_those_of_all_that_is_evaluated(model):
    data = TensorDataset(*a_batch())
    job = a_job(
        model=model, task=LanguageModel(bytes_per_token=3.0),
        data=TrainStream(data, World(), 5, 2), evaluation=EvalStream(data, World(), 1),
    )  # fmt: skip
    metrics = evaluate(job, State(), Stop(World()))
    total, count = by_definition(model, a_batch())
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-6)
    assert metrics["bits_per_byte"] == pytest.approx(total / count / math.log(2) / 3, rel=1e-6)


def test_loss_accepts_output_object_with_logits():
    class Wrapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return SimpleNamespace(logits=self.model(tokens))

    torch.manual_seed(0)
    plain = GPT(vocabulary=7, context=5, layers=1, heads=1, width=8).eval()
    expected = LanguageModel().loss(plain, a_batch())[0]
    assert LanguageModel().loss(Wrapped(plain), a_batch())[0] == expected


def test_loss_without_targets_is_zero(model):
    tokens, targets = a_batch()
    loss, _ = LanguageModel().loss(model, (tokens, torch.full_like(targets, -100)))
    assert loss.item() == 0


def test_bytes_per_token_must_be_positive():
    with pytest.raises(ValueError, match="bytes_per_token=0"):
        LanguageModel(bytes_per_token=0)
