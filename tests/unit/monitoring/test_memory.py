"""Estimated sizes against the real ones after a step and after a save."""

import pytest
import torch
from support.loop_jobs import Net, a_job, a_saver
from torch import nn

from trainer.cluster.stop import Stop
from trainer.core.state import State
from trainer.monitoring import memory
from trainer.training import loop
from trainer.training.ema import Ema


class Shapes(nn.Module):
    """Parameters with zero to four axes: two tied, one frozen, one in half precision."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.ones(17))
        self.matrix = nn.Parameter(torch.ones(19, 6))
        self.tied = self.matrix
        self.one_column = nn.Parameter(torch.ones(23, 1))
        self.kernels = nn.Parameter(torch.ones(4, 3, 5, 5))
        self.narrow = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.ones(1000), requires_grad=False)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": torch.optim.Adam,
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adamw": torch.optim.AdamW,
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
    "adafactor": torch.optim.Adafactor,
    "groups": lambda p: torch.optim.SGD(
        [{"params": list(p)[:3]}, {"params": list(p)[3:], "momentum": 0.5}], lr=0.1
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_measure_predicts_optimizer_state(kind):
    model = Shapes()
    if kind in ("fused", "foreach"):
        model.narrow.data = model.narrow.data.float()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[kind](trained)
    before = [parameter.clone() for parameter in model.parameters()]
    keys = len(optimizer.state)
    sizes = memory.measure(model, [optimizer], {}, 1)
    assert len(optimizer.state) == keys
    assert all(map(torch.equal, model.parameters(), before))
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    real = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    assert sizes.optimizer_bytes == real
    assert sizes.gradients_bytes == sum(parameter.grad.nbytes for parameter in trained)
    assert sizes.weights_bytes == sum(p.nbytes for p in model.parameters()) + 24
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert sizes.trained == sizes.parameters - 1000
    again = memory.measure(model, [optimizer], {}, 1)  # as after a resume
    assert again == sizes


class ThirdParty(torch.optim.SGD):
    """A third-party optimizer."""


@pytest.mark.parametrize("make", [torch.optim.LBFGS, lambda p: ThirdParty(p, lr=0.1)])
def test_measure_returns_none_for_unknown_optimizer_state(make):
    model = Net()
    sizes = memory.measure(model, [make(model.parameters())], {}, 1)
    assert (sizes.optimizer_bytes, sizes.checkpoint_bytes) == (None, None)
    assert sizes.weights_bytes > 0


@pytest.mark.parametrize("averaged", [False, True])
def test_measure_predicts_checkpoint_size(tmp_path, averaged):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 300), nn.Linear(300, 300), nn.Linear(300, 3))
    job = a_job(model=model, optimizer=lambda m: torch.optim.Adam(m.parameters()), max_steps=1)
    job.ema = Ema(model, 0.9) if averaged else None
    averages = job.ema.averages if averaged else {}
    sizes = memory.measure(model, [job.phases[0].optimizer], averages, 1)
    loop.train(job, State(), a_saver(tmp_path), Stop(job.world))
    real = sum(file.stat().st_size for file in tmp_path.glob("checkpoints/*/*"))
    assert sizes.checkpoint_bytes == pytest.approx(real, rel=0.05)
