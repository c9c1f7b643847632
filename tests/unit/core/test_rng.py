"""Generators: captured, restored, forked, derived."""

import random

import numpy as np
import pytest
import torch

from trainer.core import rng


@pytest.fixture(autouse=True)
def _generators_as_they_were():
    states = rng.capture()
    yield
    rng.restore(states)


def draw():
    """Return numbers of every kind that the three global generators make."""
    return (
        [random.random(), random.gauss(0, 1), random.getrandbits(70), random.sample(range(99), 5)],
        np.random.standard_normal(3).tolist() + np.random.randint(0, 1000, 5).tolist(),
        [np.random.random()],
        torch.rand(3).tolist() + torch.randn(3).tolist() + torch.randperm(7).tolist(),
        torch.nn.functional.dropout(torch.ones(9)).tolist(),
    )


@pytest.mark.parametrize("drawn", range(4))
def test_after_restore_the_same_numbers_follow(drawn):
    rng.seed_all(5)
    for _ in range(drawn):
        draw()
    states = rng.capture()
    first = draw()
    assert draw() != first
    rng.restore(states)
    assert draw() == first


@pytest.mark.parametrize("gauss", [
    lambda: random.gauss(0, 1), lambda: np.random.standard_normal(), lambda: torch.randn(1).item(),
])  # fmt: skip
def test_capture_includes_the_cached_second_gaussian(gauss):
    rng.seed_all(3)
    gauss()  # draws two and caches one
    states = rng.capture()
    rest = [gauss() for _ in range(3)]
    rng.seed_all(3)
    assert [gauss() for _ in range(3)] != rest
    rng.restore(states)
    assert [gauss() for _ in range(3)] == rest


def test_capture_returns_flat_uint8_tensors_that_never_change():
    states = rng.capture()
    assert {"python", "numpy", "torch"} <= set(states)
    before = {name: state.clone() for name, state in states.items()}
    draw()
    for name, state in states.items():
        assert (state.dtype, state.dim(), state.device.type) == (torch.uint8, 1, "cpu")
        assert torch.equal(state, before[name])


def test_restore_accepts_copies_made_through_bytes():
    states = rng.capture()
    copies = {
        name: torch.frombuffer(bytearray(state.numpy().tobytes()), dtype=torch.uint8)
        for name, state in states.items()
    }
    first = draw()
    rng.restore(copies)
    assert draw() == first


def test_restore_ignores_missing_devices():
    states = rng.capture()
    first = draw()
    rng.restore({**states, "cuda9": torch.zeros(16, dtype=torch.uint8)})
    assert draw() == first


def test_seed_all_seeds_every_generator():
    rng.seed_all(11)
    first = draw()
    rng.seed_all(11)
    assert draw() == first
    rng.seed_all(12)
    assert all(new != old for new, old in zip(draw(), first, strict=True))


def test_seed_all_accepts_63_bits():
    rng.seed_all((1 << 63) - 1)


def test_forked_seeds_the_block_and_restores_the_generators():
    rng.seed_all(1)
    undisturbed = [draw(), draw()]
    rng.seed_all(1)
    draws = [draw()]
    with rng.forked(7):
        inside = draw()
    draws.append(draw())
    assert draws == undisturbed
    with rng.forked(7):
        assert draw() == inside


def test_forked_restores_the_generators_after_an_error():
    rng.seed_all(1)
    undisturbed = draw()
    rng.seed_all(1)
    with pytest.raises(ZeroDivisionError), rng.forked(7):
        draw()[0][99 // 0]
    assert draw() == undisturbed


@pytest.mark.parametrize(("parts", "seed"), [
    (("order", 0, 0), 7453028512061360496), (("order", 0, 1), 4602570500139554110),
    (("rank", 1, 1200, 3), 835384305724941068), (("eval", 7, 40, 0), 8776782545458106456),
    (("synthetic", 0, "train"), 2675402717009117829),
])  # fmt: skip
def test_derived_seeds_never_change(parts, seed):
    """A change here changes the order of the data of every run that exists."""
    assert rng.derive(*parts) == seed


def test_derived_seeds_are_63_bits_and_differ_by_every_part():
    seeds = {rng.derive("order", seed, epoch) for seed in range(30) for epoch in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert rng.derive(1, 23) != rng.derive(12, 3)
