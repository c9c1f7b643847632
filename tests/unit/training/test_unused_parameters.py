"""Parameters without a gradient are found on the first batch, and only those."""

import pytest
import torch
from support.loop_jobs import a_job
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.config.schema import Parallel, Run
from trainer.errors import ConfigError
from trainer.training import unused_parameters
from trainer.training.rehearsal import rehearse


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Two(nn.Module):
    """Two layers of which `second` may be used in several ways."""

    def __init__(self, way="used"):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.way = way
        if way == "frozen":
            self.second.requires_grad_(False)
        if way == "tied":
            self.second = self.first

    def forward(self, x):
        x = self.first(x)
        match self.way:
            case "unused" | "frozen" | "tied":
                return x
            case "detached":
                return x + self.second(x.detach()).detach()
            case "without weight":
                return x + self.second.bias
            case "reentrant":
                return checkpoint(self.second, x, use_reentrant=True)
            case "recomputed":
                return checkpoint(self.second, x, use_reentrant=False)
            case "custom":
                return Double.apply(self.second(x))
        return self.second(x)


@pytest.mark.parametrize(
    "way", ["used", "frozen", "tied", "reentrant", "recomputed", "custom", "unused", "detached",
            "without weight"]
)  # fmt: skip
def test_check_finds_what_a_backward_leaves_without_gradient(way):
    torch.manual_seed(0)
    model = Two(way)
    model(torch.randn(3, 4)).sum().backward()
    expected = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    loss = model(torch.randn(3, 4)).sum()
    if expected:
        with pytest.raises(ConfigError, match=r"find_unused_parameters=true") as caught:
            unused_parameters.check(model, loss)
        assert f"({', '.join(expected)})" in str(caught.value)
    else:
        unused_parameters.check(model, loss)
    assert all(parameter.grad is None for parameter in model.parameters())


class WithUnused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 3) for _ in range(4))

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize(("options", "world_size", "is_rejected"), [
    ({}, 2, True),
    ({}, 1, False),
    ({"find_unused_parameters": True}, 2, False),
    ({"static_graph": True}, 2, False),
])  # fmt: skip
def test_rehearsal_rejects_unused_parameters_where_ddp_waits(options, world_size, is_rejected):
    job = a_job(model=WithUnused())
    run = Run(name="a", run_dir="a", parallel=Parallel(**options))
    if is_rejected:
        with pytest.raises(
            ConfigError, match=r"\(spare\.0\.weight, .*, spare\.2\.weight and 3 more"
        ):
            rehearse(run, job, world_size=world_size)
    else:
        rehearse(run, job, world_size=world_size)
