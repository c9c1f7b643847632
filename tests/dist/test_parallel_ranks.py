"""DDP: warm-up changes no state, buckets are final, accumulation equals the large batch."""

import torch
from torch import nn

from trainer.cluster.world import World
from trainer.config.schema import Parallel
from trainer.core import rng
from trainer.errors import ConfigError
from trainer.training import parallel, unused_parameters


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4)
    )


def warm_up(world: World, static_graph: bool):
    model = make_model()
    options = Parallel(bucket_cap_mb=0.0005, static_graph=static_graph)
    wrapped = parallel.wrap(model, world, options)
    rng.seed_all(world.rank)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generators = rng.capture()
    parallel.settle_buckets(
        wrapped, model, world, lambda: wrapped(torch.randn(5, 8)).square().mean().backward()
    )
    after = model.state_dict()
    untouched = all(torch.equal(before[name], after[name]) for name in before)
    no_gradients = all(parameter.grad is None for parameter in model.parameters())
    same_generators = all(torch.equal(a, rng.capture()[name]) for name, a in generators.items())
    return untouched, no_gradients, same_generators, parallel.has_rebuilt_buckets(wrapped)


def test_warm_up_leaves_state_unchanged_and_rebuilds_buckets_if_needed(on_ranks):
    assert on_ranks(3, warm_up, False) == [(True, True, True, True)] * 3
    assert on_ranks(2, warm_up, False) == [(True, True, True, False)] * 2  # not needed there


def gradients(world: World, size: int):
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    wrapped = parallel.wrap(model, world, Parallel())
    inputs = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    mine = inputs.chunk(world.size)[world.rank].chunk(2)
    for index, piece in enumerate(mine):
        with parallel.reducing(wrapped, last=index == 1):
            (wrapped(piece).square().mean() / 2).backward()
    buffer = nn.BatchNorm1d(3)
    buffer.running_mean.fill_(world.rank)
    parallel.take_rank0_buffers(buffer, world)
    return model.weight.grad.tolist(), buffer.running_mean.tolist()


def test_accumulated_gradients_equal_large_batch_gradients(on_ranks):
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    inputs = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    model(inputs).square().mean().backward()
    for grad, running_mean in on_ranks(2, gradients, 2):
        torch.testing.assert_close(torch.tensor(grad), model.weight.grad)
        assert running_mean == [0.0, 0.0, 0.0]


class SometimesUnused(nn.Module):
    """The second layer is used in the first two calls only."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.first(x) + (self.second(x) if self.calls <= 2 else 0)


def errors_of_unused(world: World, in_phase: bool):
    model = SometimesUnused()
    if in_phase:
        wrapped = parallel.wrap_phases(
            model, world, Parallel(), {"a": [name for name, _ in model.named_parameters()]}
        )["a"]
    else:
        wrapped = parallel.wrap(model, world, Parallel())
    inputs = torch.randn(2, 4)
    for _ in range(5):
        try:
            with unused_parameters.named(wrapped):
                loss = (wrapped(lambda m: m(inputs)) if in_phase else wrapped(inputs)).sum()
        except ConfigError as error:
            return str(error)
        loss.backward()
    return ""


def test_parameters_that_become_unused_are_named(on_ranks):
    for in_phase in (False, True):
        for text in on_ranks(2, errors_of_unused, in_phase):
            assert "(second.weight, second.bias)" in text
            assert "parallel.find_unused_parameters=true" in text
