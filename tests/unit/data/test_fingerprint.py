"""Fingerprints of datasets: which changes a resume recognises."""

import numpy as np
import pytest
import torch

from trainer.cluster.world import World
from trainer.data.fingerprint import changed_parts, fingerprint
from trainer.data.source import EvalStream

CLASSES = 5


class Samples:
    """Samples with inputs, a label, a text, and pixels; `unstable` parts differ per reading."""

    def __init__(self, size=40, *, order=None, labels=range(CLASSES), noise=0.0, unstable=False):
        self.size, self.noise, self.unstable, self.reads = size, noise, unstable, 0
        self.order = list(order or range(size))
        self.labels = list(labels)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        number = self.order[index]
        self.reads += 1
        return {
            "x": torch.full((3,), number + self.noise),
            "y": self.labels[number % CLASSES],
            "tokens": np.array([number, self.reads if self.unstable else 0]),
            "name": f"{number}.png",
            "pixels": torch.full((2, 2), int(self.noise), dtype=torch.uint8),
        }


def changes(before, now, workers=0):
    """Return the parts that a resume with `now` would name."""
    first, second = (EvalStream(data, World(), 4, workers) for data in (before, now))
    return changed_parts(fingerprint(first), fingerprint(second), second)


def test_changed_labels_are_recognised():
    assert changes(Samples(), Samples(labels=[0, 1, 2, 4, 3])) == ["part y"]


def test_another_order_is_recognised():
    parts = changes(Samples(), Samples(order=reversed(range(40))))
    assert {"part y", "part tokens", "part name[0]"} <= set(parts)


@pytest.mark.parametrize("workers", [0, 1])
def test_changed_parts_ignores_equal_data_and_rounding(workers):
    assert changes(Samples(), Samples(), workers) == []
    assert changes(Samples(), Samples(noise=1e-3)) == []
    assert changes(Samples(noise=1.0), Samples(noise=2.0)) == []  # as another JPEG decoder


def test_changed_parts_ignores_parts_that_differ_per_reading():
    now = Samples(unstable=True, labels=[1, 0, 2, 3, 4])
    now.reads = 1000
    assert changes(Samples(unstable=True), now) == ["part y"]


@pytest.mark.parametrize("size", [1, 2, 15, 17, 1000])
def test_samples_are_spread_over_datasets_of_any_size(size):
    last = Samples(size)
    last.order[-1] = size  # another sample
    assert "part name" in "".join(changes(Samples(size), last))


def test_unreadable_samples_give_an_empty_fingerprint():
    class Broken(Samples):
        def __getitem__(self, index):
            raise OSError("gone")

    assert fingerprint(EvalStream(Broken(), World(), 4)) == {}
    assert changes(Samples(), Broken()) == []
