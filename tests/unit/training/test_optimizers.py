"""State of optimizers: resumed exactly, or rejected by name before the first step."""

import pytest
import torch
from support import wrapper_optimizers as wrappers
from support.killed_jobs import Deadly, resumed_like_undisturbed
from support.loop_jobs import Net, a_job, a_saver, go_on
from support.mode_optimizers import ScheduleFree
from torch import nn

from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.core import rng
from trainer.core.state import State
from trainer.errors import CheckpointError, ConfigError
from trainer.training import loop, optimizers

pytestmark = pytest.mark.usefixtures("one_thread")


def node_of(kind, **settings):
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", "lr": 0.05, **settings}


def make(kind, model, groups=None, **settings):
    groups = groups or [{"params": [*model.parameters()]}]
    return optimizers.make(node_of(kind, **settings), groups, model)


RESTORED = [
    wrappers.WrapperDict, wrappers.WrapperShared, wrappers.LookaheadDict, wrappers.CounterInGroup,
    wrappers.CounterDict, wrappers.GlobalNoise, wrappers.Timed, wrappers.Masked, wrappers.Setting,
    ScheduleFree,
]  # fmt: skip
LOST = {
    wrappers.Wrapper: r"base\.state\[0\]\['momentum_buffer'\]",
    wrappers.Lookahead: r"base\.state.*count, slow\[0\]",
    wrappers.LookaheadHalfDict: "state in count, which",
    wrappers.Counter: "state in count, which",
    wrappers.History: r"state in recent\[0\], recent\[1\], recent\[2\], which",
    wrappers.Noise: "state in generator, which",
    wrappers.Hidden: "a variable outside of its attributes",
}


@pytest.mark.parametrize("kind", RESTORED)
def test_train_killed_with_any_wrapper_ends_with_the_same_bits(tmp_path, kind):
    def job(**changes):
        return a_job(optimizer=lambda model: make(kind, model), **changes)

    again = resumed_like_undisturbed(tmp_path, job, Deadly(8), every=7)
    assert again.phases[0].optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("kind", LOST)
def test_make_rejects_state_that_a_checkpoint_would_miss_by_name(kind):
    with pytest.raises(ConfigError, match=f"{kind.__name__} keeps .*{LOST[kind]}"):
        make(kind, Net())


def test_make_rejects_state_that_cannot_be_stored():
    with pytest.raises(ConfigError, match=r"Unstorable cannot be saved: .*handle"):
        make(wrappers.Unstorable, Net())


def test_make_rejects_state_under_a_key_that_is_not_a_parameter():
    with pytest.raises(ConfigError, match=r"cannot be saved: optimizer.state has the key 'count'"):
        make(wrappers.OtherKey, Net())


def test_make_accepts_an_optimizer_that_cannot_be_tried():
    assert type(make(wrappers.Bound, Net())) is wrappers.Bound


def test_make_tries_every_group():
    model = Net()
    weights = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": rest}, {"params": weights, "momentum": 0.9}]
    assert len(make(wrappers.Timed, model, groups).param_groups) == 2
    with pytest.raises(ConfigError, match="state in count"):
        make(wrappers.Counter, model, groups)


def test_make_leaves_the_generators_unchanged():
    model = Net()
    before = rng.capture()
    make(wrappers.GlobalNoise, model)
    assert all(torch.equal(before[name], value) for name, value in rng.capture().items())


def test_load_rejects_own_state_of_other_groups(tmp_path):
    def job(count):
        def optimizer(model):
            listed = [*model.parameters()]
            groups = [{"params": listed[:count], "lr": 0.01}, {"params": listed[count:]}]
            return make(wrappers.WrapperDict, model, groups)

        return a_job(optimizer=optimizer)

    loop.train(job(2), State(), a_saver(tmp_path), Stop(World()))
    with pytest.raises(CheckpointError, match="groups"):
        go_on(tmp_path, job(3))


TORCH = [
    "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam",
    "RMSprop", "Rprop", "SGD",
]  # fmt: skip
DERIVED = {
    name: type(name, (getattr(torch.optim, name),), {"__module__": __name__}) for name in TORCH
}
globals().update(DERIVED)  # found by their dotted names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TORCH)
def test_make_accepts_every_optimizer_of_torch_under_another_name(name, dtype):
    model = Net().to(dtype)
    assert type(make(DERIVED[name], model)) is DERIVED[name]
    listed = [*model.parameters()]
    groups = [{"params": listed[:2], "lr": 0.01}, {"params": listed[2:], "weight_decay": 0.1}]
    assert len(make(DERIVED[name], model, groups).param_groups) == 2


# --- shapes ------------------------------------------------------------------------------------


class TwoBiases(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 2)


def test_make_names_the_parameters_that_an_optimizer_rejects():
    with pytest.raises(ConfigError, match=r"only supports 2D.*: a.bias, b.bias; accepted: 2"):
        make(torch.optim.Muon, TwoBiases())


def test_make_accepts_muon_without_parameters_of_one_dimension():
    model = nn.Linear(2, 3, bias=False)
    assert type(make(torch.optim.Muon, model)) is torch.optim.Muon


def test_make_passes_on_what_an_optimizer_rejects_for_all_parameters():
    with pytest.raises(ConfigError, match="rejected its arguments: Invalid learning rate: -1"):
        make(torch.optim.SGD, TwoBiases(), lr=-1)
