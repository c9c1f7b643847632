"""What is done to a model's blocks: names stay, and so do the numbers."""

import pytest
import torch
from torch import nn

from trainer.core import rng
from trainer.errors import ConfigError
from trainer.training import parallel
from trainer.training.parallel import BlockOptions

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own tracing


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return x + self.dropout(torch.tanh(self.inner(x)))


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
    """Return what one forward and backward with dropout makes, bit for bit."""
    rng.seed_all(5)
    out = model(torch.linspace(-1, 1, 12).view(3, 4))
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


def assert_same(found, wanted):
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_recomputed_blocks_give_the_same_bits_and_are_computed_twice():
    plain, ours = a_model(Counting), a_model(Counting)
    parallel.modify(ours, BlockOptions(blocks=["Counting"], recompute=True))
    assert_same(gradients(ours), gradients(plain))
    assert [block.calls for block in (*plain[1:3], *ours[1:3])] == [1, 1, 2, 2]
    assert list(ours.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        ours(torch.zeros(1, 4))
    assert ours[1].calls == 3


@pytest.mark.parametrize("compile", ["model", "blocks"])
def test_compiled_blocks_may_recompute_too(compile):
    plain, ours = a_model(), a_model()
    options = BlockOptions(["Block"], compile=compile, compile_backend="aot_eager", recompute=True)
    parallel.modify(ours, options)
    assert_same(gradients(ours), gradients(plain))


@pytest.mark.parametrize("compile", ["model", "blocks"])
def test_a_compiled_model_keeps_its_names_and_what_it_computes(compile):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    plain, ours = a_model(), a_model()
    parallel.modify(ours, BlockOptions(["Block"], compile=compile, compile_backend=backend))
    assert_same(gradients(ours), gradients(plain))
    assert compiled
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in plain.named_modules()]


def test_blocks_are_found_by_their_size_too():
    model = a_model()
    parallel.modify(model, BlockOptions(min_parameters=40, recompute=True))
    changed = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert changed == ["1.inner", "2.inner"]  # and nothing around them has 40 more


def test_nothing_asked_for_changes_nothing():
    model = a_model()
    parallel.modify(model, BlockOptions())
    assert all("forward" not in vars(module) for module in model.modules())


def test_blocks_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"Blok.*did you mean 'Block'"):
        parallel.modify(a_model(), BlockOptions(blocks=["Blok"], compile="blocks"))
    with pytest.raises(ConfigError, match=r"1,000,000 parameters.*parallel\.blocks"):
        parallel.modify(a_model(), BlockOptions(recompute=True))


def test_a_block_whose_statistics_would_take_a_batch_twice_is_refused():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match="BatchNorm"):
        parallel.modify(model, BlockOptions(blocks=["Sequential"], recompute=True))
