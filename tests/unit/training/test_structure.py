"""Buffers that appear late are resumed; structure that cannot be is named before its first save."""

from itertools import product

import pytest
import torch
from support.loop_jobs import Net, a_job, everything, go_on
from torch import nn

from trainer.config.schema import Run
from trainer.core.intervals import Every
from trainer.errors import ConfigError
from trainer.training import evaluation, structure
from trainer.training.parallel import buffers_restored
from trainer.training.rehearsal import rehearse

pytestmark = pytest.mark.usefixtures("one_thread")


class Late(Net):
    """Network with a declared buffer of unknown shape, which is created at call `at`.

    Args:
        at: number of the call, from 1.
        only: create it in `train` or `eval` mode only.
        dtype: of the buffer.
    """

    def __init__(self, at=1, only="", dtype=torch.float32):
        torch.manual_seed(0)
        super().__init__()
        self.register_buffer("seen", None)
        self.register_buffer("cache", None, persistent=False)
        self.at, self.only, self.dtype = at, only, dtype
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += self.training
        self.cache = x.mean()
        mode = "train" if self.training else "eval"
        if self.seen is None and self.calls >= self.at and self.only in ("", mode):
            self.seen = torch.zeros(6, dtype=self.dtype)
        if self.seen is not None and self.training:
            self.seen = self.seen + x.detach().mean(dim=0).to(self.dtype)
        return super().forward(x) + (0 if self.seen is None else self.seen.float().mean())


@pytest.mark.parametrize(("at", "only"), list(product((1, 4, 9), ("", "eval"))))
def test_late_buffers_resume_exactly(at, only, tmp_path):
    """A run that is stopped at every step equals one that is not."""
    options = {"eval_every": Every(steps=1)}  # as often in a run of one step
    undisturbed = a_job(model=Late(at, only, torch.float64), **options)
    state, _ = go_on(tmp_path / "a", undisturbed)
    for steps in range(1, 13):
        job = a_job(model=Late(at, only, torch.float64), max_steps=steps, **options)
        resumed, _ = go_on(tmp_path / "b", job, every=Every(steps=1))
    assert (job.model.seen is None) == (undisturbed.model.seen is None)
    assert everything(job, resumed) == everything(undisturbed, state)
    buffers = dict(undisturbed.model.named_buffers())
    assert all(torch.equal(buffers[name], b) for name, b in job.model.named_buffers())


@pytest.mark.parametrize("only", ["", "eval"])
def test_rehearsal_empties_late_buffers_again(only):
    job = a_job(model=Late(only=only))
    job.declared = structure.declared(job.model)
    rehearse(Run(name="a", run_dir="a"), job)
    assert job.model.seen is None
    assert job.model.cache is None
    assert job.model.calls == 0


def test_buffers_that_were_replaced_are_restored():
    model = Late()
    model(torch.ones(2, 6))
    seen, value = model.seen, model.seen.clone()
    with buffers_restored(model):
        model(torch.ones(2, 6))
        assert model.seen is not seen
    assert model.seen is seen
    assert torch.equal(seen, value)


class Undeclared(Net):
    """Network that creates a parameter, a module or a buffer in its first forward in one mode."""

    def __init__(self, kind, mode):
        super().__init__()
        self.kind, self.mode = kind, mode

    def forward(self, x):
        if not hasattr(self, "late") and self.training == (self.mode == "train"):
            match self.kind:
                case "parameter":
                    self.late = nn.Parameter(torch.ones(3))
                case "module":
                    self.late = nn.Linear(6, 3)
                case "buffer":
                    self.register_buffer("late", torch.ones(3))
        return super().forward(x)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("kind", "names"), [
    ("parameter", "late"), ("module", r"late\.weight, late\.bias"), ("buffer", "late")
])  # fmt: skip
def test_undeclared_tensors_are_rejected_by_name(kind, names, mode, tmp_path):
    job = a_job(model=Undeclared(kind, mode), eval_every=Every(steps=1))
    job.declared = structure.declared(job.model)
    with pytest.raises(ConfigError, match=f"model: {names} were created in a forward pass"):
        rehearse(Run(name="a", run_dir="a"), job)
    job = a_job(model=Undeclared(kind, mode), eval_every=Every(steps=1))
    job.declared = structure.declared(job.model)
    with pytest.raises(ConfigError, match=f"model: {names} were created in a forward pass"):
        go_on(tmp_path, job, every=Every(steps=2))
    assert not list(tmp_path.glob("checkpoints/*/manifest.json"))


class Costly(Net):
    """Network whose extra state takes long to compute."""

    computed = 0

    def get_extra_state(self):
        self.computed += 1
        return self.computed

    def set_extra_state(self, state):
        pass


def test_check_computes_no_extra_state():
    model = Costly()
    structure.check(model, structure.declared(model))
    assert model.computed == 0


@pytest.mark.parametrize("module", [
    nn.LazyLinear(3), nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d()), nn.LazyConv2d(3, 1)
])  # fmt: skip
def test_lazy_modules_are_rejected_until_they_have_shapes(module):
    with pytest.raises(ConfigError, match="get their shape in the first forward pass"):
        structure.declared(module)
    module(torch.ones(2, 4, 1, 1) if isinstance(module, nn.LazyConv2d) else torch.ones(2, 4))
    assert structure.declared(module) == frozenset(module.state_dict())


@pytest.mark.parametrize("keeps", [False, True])
def test_frozen_modules_stay_in_evaluation_mode_if_asked(keeps, tmp_path):
    model = Net()
    model.body[:2].requires_grad_(False)
    frozen = structure.frozen_modules(model)
    assert list(frozen) == ["body.0", "body.1"]
    assert "body.1: parameters are frozen" in structure.statistics_warning(frozen)
    job = a_job(model=model, optimizer=trained_sgd, eval_every=Every(steps=3))
    job.frozen = list(frozen.values()) if keeps else []
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    go_on(tmp_path, job)
    same = [torch.equal(before[name], buffer) for name, buffer in model.named_buffers()]
    assert all(same) if keeps else not any(same)
    evaluation.to_training(job)
    assert [module.training for module in model.body] == [not keeps] * 2 + [True] * 3


def trained_sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def test_models_without_frozen_statistics_get_no_warning():
    assert structure.statistics_warning(structure.frozen_modules(Net())) == ""
    model = Net()
    model.body[0].requires_grad_(False)
    assert structure.statistics_warning(structure.frozen_modules(model)) == ""


class OneWay(nn.Module):
    def get_extra_state(self):
        return {"count": 3}


class BothWays(OneWay):
    def set_extra_state(self, state):
        pass


class ByHand(OneWay):
    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict.pop(f"{prefix}_extra_state")


def test_declared_rejects_extra_state_that_cannot_be_restored():
    with pytest.raises(
        ConfigError, match=r"1.0 \(OneWay\) has get_extra_state\(\) but no set_extra"
    ):
        structure.declared(nn.Sequential(nn.Linear(2, 2), nn.Sequential(OneWay())))
    structure.declared(nn.Sequential(BothWays(), ByHand()))
