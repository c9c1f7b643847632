"""Encoding of values as JSON: equal after decoding, or rejected by name."""

import enum
import inspect
import json
import math
import re
from collections import Counter, OrderedDict, namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.saved_tensors import restore_optimizers
from torch import nn
from torch.optim import lr_scheduler as lrs

from trainer.checkpoint import state_tree
from trainer.checkpoint.state_tree import Content
from trainer.checkpoint.values import TensorRef, decode, dump, encode
from trainer.errors import CheckpointError


def through_json(value: Any) -> Any:
    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is not strict JSON")

    return decode(json.loads(dump(encode(value, "value")), parse_constant=no_constant))


def canonical(value: Any) -> Any:
    """Return what two values share if and only if they are equal in value, type and order."""
    kind = type(value)
    if kind is float:
        return kind, value.hex()  # tells -0.0 from 0.0; not-a-number equals itself
    if kind is complex:
        return kind, value.real.hex(), value.imag.hex()
    if isinstance(value, np.generic):
        return kind, value.dtype.str, value.tobytes()
    if isinstance(value, dict):
        return kind, [(canonical(key), canonical(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return kind, [canonical(item) for item in value]
    if isinstance(value, set | frozenset):
        return kind, sorted((canonical(item) for item in value), key=repr)
    return kind, value


def floats_of(width: int) -> st.SearchStrategy[float]:
    return st.floats(width=width, allow_nan=True, allow_infinity=True)


NUMPY_SCALARS = st.one_of(
    floats_of(64).map(np.float64),
    floats_of(32).map(np.float32),
    floats_of(16).map(np.float16),
    st.integers(-(1 << 63), (1 << 63) - 1).map(np.int64),
    st.integers(0, (1 << 64) - 1).map(np.uint64),
    st.integers(-128, 127).map(np.int8),
    st.booleans().map(np.bool_),
    st.complex_numbers().map(np.complex128),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**60), 10**60),
    floats_of(64),
    st.sampled_from([math.inf, -math.inf, math.nan, -0.0, 5e-324]),
    st.complex_numbers(),
    st.binary(max_size=8),
    st.text(max_size=8),
    st.sampled_from(["$float", "$dict", "$", "$unknown"]),
    st.builds(TensorRef, st.text(max_size=4)),
    NUMPY_SCALARS,
)
HASHABLE = st.recursive(
    SCALARS,
    lambda children: (
        st.lists(children, max_size=3).map(tuple) | st.frozensets(children, max_size=3)
    ),
    max_leaves=3,
)
KEYS = st.text(max_size=4) | st.integers(-3, 99) | HASHABLE


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dicts = st.dictionaries(KEYS, children, max_size=4)
    return st.one_of(
        st.lists(children, max_size=4),
        st.lists(children, max_size=4).map(tuple),
        dicts,
        st.dictionaries(st.text(max_size=4).map("${}".format), children, max_size=2),
        dicts.map(OrderedDict),
        dicts.map(Counter),
        st.sets(HASHABLE, max_size=4),
    )


@settings(max_examples=300, deadline=None)
@given(st.recursive(SCALARS, containers, max_leaves=12))
@example({1: "a", "1": "b", 1.5: "c", (1, 2): "d", None: "e"})
@example({"$float": "inf"})
@example({"$dict": [[1, 2]]})
@example({"$tensor": "x", "y": TensorRef("y")})
@example(Counter({3: 2, 7: 1}))
@example([True, 1, 1.0, 10**40, "1", b"1"])
@example(complex(-0.0, math.inf))
def test_every_storable_value_comes_back_equal_in_value_and_type(value):
    assert canonical(through_json(value)) == canonical(value)


def test_encode_set_is_independent_of_insertion_order():
    names = [f"name{i}" for i in range(50)]
    there, back = set(), set()
    for forth, reverse in zip(names, reversed(names), strict=True):
        there.add(forth)
        back.add(reverse)
    assert dump(encode(there, "x")) == dump(encode(back, "x"))


class Colour(enum.IntEnum):
    RED = 1


class Named(dict):
    pass


Point = namedtuple("Point", "x y")

UNKNOWN = [
    object(), len, Path("x"), torch.float32, torch.zeros(2), torch.Size([1]), Colour.RED,
    Named(a=1), Point(1, 2), range(3), bytearray(b"x"), np.dtype("f4"),
    np.zeros(2), np.array(3.0), np.str_("x"), np.bytes_(b"x"), np.datetime64("2026-01-01"),
    np.timedelta64(1, "s"), np.longlong(1),
]  # fmt: skip


@pytest.mark.parametrize("value", UNKNOWN, ids=lambda value: type(value).__name__)
def test_encode_rejects_unsupported_value_by_name(value):
    with pytest.raises(CheckpointError, match=r"objects\.groups\[1\]\.extra is a ") as caught:
        encode({"groups": [{}, {"extra": value}]}, "objects")
    assert type(value).__qualname__ in str(caught.value)


def test_encode_rejects_unsupported_keys_and_set_elements():
    with pytest.raises(CheckpointError, match="x key is a"):
        encode({Colour.RED: 1}, "x")
    with pytest.raises(CheckpointError, match="PosixPath"):
        encode({Path("a")}, "x")


# --- schedulers ----------------------------------------------------------------------------------


class Halving:
    """A stateful rule that the scheduler stores."""

    def __init__(self, every: int) -> None:
        self.every = every

    def __call__(self, step: int) -> float:
        return 0.5 ** (step // self.every)


def sequential(optimizer: torch.optim.Optimizer) -> lrs.LRScheduler:
    parts = [lrs.ConstantLR(optimizer, 0.5, 3), lrs.MultiStepLR(optimizer, [1, 3], 0.1)]
    return lrs.SequentialLR(optimizer, parts, milestones=[4])


def chained(optimizer: torch.optim.Optimizer) -> lrs.LRScheduler:
    return lrs.ChainedScheduler(
        [lrs.ExponentialLR(optimizer, 0.9), lrs.MultiStepLR(optimizer, [2, 6], 0.1)]
    )


SCHEDULERS = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, Halving(3)),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.95),
    "StepLR": lambda o: lrs.StepLR(o, 3),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 6, 6], 0.1),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, 6),
    "LinearLR": lambda o: lrs.LinearLR(o, total_iters=7),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "SequentialLR": sequential,
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, total_iters=9, power=2),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, T_max=7),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=3, scale_fn=Halving(5)),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=3),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, max_lr=0.1, total_steps=20),
}


def concrete_classes(module: Any, base: type) -> set[str]:
    classes = {n: c for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base)}
    return {name for name in classes if name not in ("LRScheduler", "_LRScheduler", "Optimizer")}


def test_every_scheduler_of_torch_is_tested_here():
    assert concrete_classes(lrs, lrs.LRScheduler) == set(SCHEDULERS)


def new_scheduler(name: str) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    return optimizer, SCHEDULERS[name](optimizer)


def follow(optimizer: torch.optim.Optimizer, scheduler: Any, passes: int) -> list[float]:
    rates = []
    for _ in range(passes):
        optimizer.step()
        takes_metric = isinstance(scheduler, lrs.ReduceLROnPlateau)
        scheduler.step(*([1.0] if takes_metric else []))
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.filterwarnings(  # raised inside torch's own SequentialLR
    "ignore:The epoch parameter in `scheduler.step:UserWarning"
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_restored_scheduler_continues_exactly(name):
    optimizer, scheduler = new_scheduler(name)
    follow(optimizer, scheduler, 4)
    tensors: dict[str, torch.Tensor] = {}
    state = state_tree.split(scheduler.state_dict(), "scheduler", tensors)
    restored = through_json(state)
    assert canonical(restored) == canonical(state)
    other_optimizer, other = new_scheduler(name)
    for group, stored in zip(
        other_optimizer.param_groups, optimizer.state_dict()["param_groups"], strict=True
    ):
        group.update({key: value for key, value in stored.items() if key != "params"})
    other.load_state_dict(state_tree.join(restored, tensors.__getitem__))
    assert follow(other_optimizer, other, 8) == follow(optimizer, scheduler, 8)


def test_multi_step_lr_still_decays_after_a_reload():
    _, scheduler = new_scheduler("MultiStepLR")
    optimizer, restored = new_scheduler("MultiStepLR")
    restored.load_state_dict(through_json(scheduler.state_dict()))
    assert follow(optimizer, restored, 7) == pytest.approx([0.1] + [0.01] * 4 + [1e-4] * 2)
    assert restored.milestones == Counter({6: 2, 2: 1})


# --- optimizers ----------------------------------------------------------------------------------


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def matrices() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))


def sparse() -> nn.Module:
    torch.manual_seed(0)
    return nn.EmbeddingBag(6, 3, sparse=True, mode="sum")


OPTIMIZERS = {
    "Adafactor": (dense, torch.optim.Adafactor),
    "Muon": (matrices, torch.optim.Muon),
    "Adadelta": (dense, torch.optim.Adadelta),
    "Adagrad": (dense, torch.optim.Adagrad),
    "Adam": (dense, torch.optim.Adam),
    "Adam, amsgrad, tensor lr": (
        dense,
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), amsgrad=True, foreach=False),
    ),
    "Adamax": (dense, torch.optim.Adamax),
    "AdamW": (dense, torch.optim.AdamW),
    "ASGD": (dense, partial(torch.optim.ASGD, lr=0.1, t0=1)),
    "LBFGS": (dense, partial(torch.optim.LBFGS, history_size=3, max_iter=3)),
    "NAdam": (dense, torch.optim.NAdam),
    "RAdam": (dense, torch.optim.RAdam),
    "RMSprop": (dense, partial(torch.optim.RMSprop, momentum=0.9, centered=True)),
    "Rprop": (dense, torch.optim.Rprop),
    "SGD": (dense, partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
    "SGD, plain": (dense, partial(torch.optim.SGD, lr=0.1)),
    "SparseAdam": (sparse, torch.optim.SparseAdam),
}


def test_every_optimizer_of_torch_is_tested_here():
    tested = {name.partition(",")[0] for name in OPTIMIZERS}
    assert concrete_classes(torch.optim, torch.optim.Optimizer) == tested


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, nn.EmbeddingBag):
        inputs = torch.randint(0, 6, (5, 2), generator=generator)
    else:
        inputs = torch.randn(5, 4, generator=generator)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(inputs) - 1).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_optimizer_continues_exactly(name):
    make_model, make_optimizer = OPTIMIZERS[name]
    model = make_model()
    optimizer = make_optimizer(list(model.parameters()))
    take_step(model, optimizer, 1)
    take_step(model, optimizer, 2)
    content = Content()
    state_tree.add_optimizers(content, model, [optimizer])
    restored = through_json(content.objects)
    assert canonical(restored) == canonical(content.objects)

    other_model = make_model()
    other_model.load_state_dict(model.state_dict())
    other = make_optimizer(list(other_model.parameters()))
    stored = {
        key: (tensor.dtype, tuple(tensor.shape))
        for key, tensor in content.tensors.items()
        if key.startswith("optimizer.")
    }
    copies = {key: tensor.clone() for key, tensor in content.tensors.items()}

    def read(tensors):
        for key, tensor in tensors.items():
            tensor.copy_(copies[key])

    restore_optimizers(
        other_model, [other], restored["optimizer"], stored, read, copies.__getitem__
    )

    take_step(model, optimizer, 3)
    take_step(other_model, other, 3)
    for expected, actual in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(expected, actual)


# --- tensors inside of values --------------------------------------------------------------------


def test_tensors_inside_of_values_leave_a_reference_and_come_back():
    value = {"a": [torch.ones(1), {"b": (torch.zeros(2), 3)}], "c": {1: "x"}, "d": None}
    tensors: dict[str, torch.Tensor] = {}
    parts = state_tree.split(value, "p", tensors)
    assert parts["a"][0] == TensorRef("p.a.0")
    assert sorted(state_tree.tensor_names(parts)) == sorted(tensors) == ["p.a.0", "p.a.1.b.0"]
    back = state_tree.join(through_json(parts), tensors.__getitem__)
    assert back["a"][0] is tensors["p.a.0"]
    assert back["a"][1]["b"][0] is tensors["p.a.1.b.0"]
    assert type(back["a"][1]["b"]) is tuple
    assert (back["a"][1]["b"][1], back["c"], back["d"]) == (3, {1: "x"}, None)


@pytest.mark.parametrize(
    "value",
    [
        {1: torch.ones(1), "1": torch.zeros(1)},
        {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
    ],
)
def test_split_rejects_duplicate_names(value):
    with pytest.raises(CheckpointError, match=re.escape("p.")):
        state_tree.split(value, "p", {})
