"""Compilation and recomputation of blocks: same parameter names, same numbers."""

import pytest
import torch
from torch import nn

from trainer.config.schema import Parallel
from trainer.core import rng
from trainer.errors import ConfigError
from trainer.training import parallel

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # from torch's tracing


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return x + self.dropout(torch.tanh(self.linear(x)))


class Counting(Block):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def a_model(block=Block):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), block(), block(), nn.Linear(6, 2))


def gradients(model):
    """Return the output and gradients of one forward and backward with dropout."""
    rng.seed_all(5)
    out = model(torch.linspace(-1, 1, 12).view(3, 4))
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


def assert_same(actual, expected):
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_modify_recompute_runs_blocks_twice_with_identical_gradients():
    plain, modified = a_model(Counting), a_model(Counting)
    parallel.modify(modified, Parallel(blocks=["Counting"], recompute=True))
    assert_same(gradients(modified), gradients(plain))
    assert [block.calls for block in (*plain[1:3], *modified[1:3])] == [1, 1, 2, 2]
    assert list(modified.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        modified(torch.zeros(1, 4))
    assert modified[1].calls == 3


@pytest.mark.parametrize("compile", ["model", "blocks"])
def test_modify_compile_with_recompute_gives_identical_gradients(compile):
    plain, modified = a_model(), a_model()
    options = Parallel(
        blocks=["Block"], compile=compile, compile_backend="aot_eager", recompute=True
    )
    parallel.modify(modified, options)
    assert_same(gradients(modified), gradients(plain))


@pytest.mark.parametrize("compile", ["model", "blocks"])
def test_modify_compile_preserves_names_and_gradients(compile):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    plain, modified = a_model(), a_model()
    parallel.modify(modified, Parallel(blocks=["Block"], compile=compile, compile_backend=backend))
    assert_same(gradients(modified), gradients(plain))
    assert compiled
    assert list(modified.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in modified.named_modules()] == [
        name for name, _ in plain.named_modules()
    ]


def test_modify_selects_blocks_by_size():
    model = a_model()
    parallel.modify(model, Parallel(min_parameters=40, recompute=True))
    changed = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert changed == ["1.linear", "2.linear"]  # no module around them has 40 more


def test_modify_defaults_change_nothing():
    model = a_model()
    parallel.modify(model, Parallel())
    assert all("forward" not in vars(module) for module in model.modules())


def test_modify_without_matching_blocks_raises():
    with pytest.raises(ConfigError, match=r"Blok.*did you mean 'Block'"):
        parallel.modify(a_model(), Parallel(blocks=["Blok"], compile="blocks"))
    with pytest.raises(ConfigError, match=r"1,000,000 parameters.*parallel\.blocks"):
        parallel.modify(a_model(), Parallel(recompute=True))


def test_modify_recompute_of_batchnorm_raises():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match="BatchNorm"):
        parallel.modify(model, Parallel(blocks=["Sequential"], recompute=True))
