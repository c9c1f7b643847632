"""The shipped data against its sources, and how batches are fetched."""

import random
import time
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset, default_collate

from trainer.cluster.world import World
from trainer.data.batches import fetch, to_device
from trainer.data.digits import Digits
from trainer.data.source import EvalStream, TrainStream
from trainer.data.synthetic import Synthetic
from trainer.errors import DataError

# --- digits --------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_and_every_fifth_is_for_evaluation():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    digits = Digits()
    train, evaluation = digits.train.tensors, digits.eval.tensors
    assert [tuple(t.shape) for t in train] == [(1438, 1, 8, 8), (1438,)]
    assert [tuple(t.shape) for t in evaluation] == [(359, 1, 8, 8), (359,)]
    assert [t.dtype for t in train] == [torch.float32, torch.int64]
    every_fifth = np.arange(1797) % 5 == 4
    for (images, labels), is_split in ((train, ~every_fifth), (evaluation, every_fifth)):
        assert np.array_equal(images.numpy()[:, 0] * 16, bunch.images[is_split])
        assert np.array_equal(labels.numpy(), bunch.target[is_split])
        assert images.min() == 0
        assert images.max() == 1
        assert set(labels.tolist()) == set(range(10))


# --- synthetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (1, 8, 8), [3, 4, 5, 2]])
def test_synthetic_accepts_any_shape(shape):
    source = Synthetic(shape, classes=4, train_samples=30, eval_samples=9)
    inputs, labels = source.train.tensors
    assert inputs.shape == (30, *shape)
    assert inputs.dtype == torch.float32
    assert (labels.dtype, labels.shape) == (torch.int64, (30,))
    assert set(labels.tolist()) <= set(range(4))
    assert len(source.eval) == 9


def test_synthetic_is_a_function_of_its_seed():
    torch.manual_seed(0)
    first = Synthetic((4,), seed=3, train_samples=20)
    torch.manual_seed(1)
    same, other = Synthetic((4,), seed=3, train_samples=20), Synthetic((4,), seed=4)
    assert torch.equal(first.train.tensors[0], same.train.tensors[0])
    assert torch.equal(first.eval.tensors[0], same.eval.tensors[0])
    assert not torch.equal(first.eval.tensors[0], other.eval.tensors[0])


def test_synthetic_splits_share_only_their_patterns():
    source = Synthetic((6,), classes=3, train_samples=50, eval_samples=50, noise=0.0)
    patterns = {}
    for inputs, labels in (source.train.tensors, source.eval.tensors):
        for row, label in zip(inputs, labels.tolist(), strict=True):
            assert torch.equal(patterns.setdefault(label, row), row)
    assert len(patterns) == 3
    assert not torch.equal(source.train.tensors[1], source.eval.tensors[1])


# --- batches -------------------------------------------------------------------------------------


class Plain:
    """A map-style dataset that returns pairs."""

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return torch.tensor([index, -index]), 10 * index


class Mappings(Plain):
    def __getitem__(self, index):
        return {"x": torch.tensor([index, -index]), "y": 10 * index}


class Batched(Plain):
    """A dataset that makes a batch itself."""

    asked = None

    def __getitem__(self, index):
        raise AssertionError("samples are out of range one by one")

    def __getitems__(self, indices):
        self.asked = indices
        rows = torch.tensor(indices)
        return torch.stack([rows, -rows], 1), 10 * rows


class ListOfSamples(Plain):
    """Dataset whose `__getitems__` returns a list of samples, as torch's contract allows."""

    def __getitems__(self, indices):
        return [Plain.__getitem__(self, index) for index in indices]


INDICES = torch.tensor([4, 0, 7])
EXPECTED = (torch.tensor([[4, -4], [0, 0], [7, -7]]), torch.tensor([40, 0, 70]))


def in_tensors():
    rows = torch.arange(9)
    return TensorDataset(torch.stack([rows, -rows], 1), 10 * rows)


@pytest.mark.parametrize("make", [in_tensors, Plain, Batched, ListOfSamples])
def test_fetch_gives_the_same_batch_for_every_kind_of_dataset(make):
    batch = fetch(make(), INDICES)
    assert all(map(torch.equal, batch, EXPECTED))
    assert len(batch) == 2


class SeededBase(Plain):
    def get_seeded(self, indices, seeds):
        raise AssertionError("the subclass has its own __getitem__")


class Proxy(Plain):
    """Wrapper that passes look-ups to the dataset inside, which has other indices."""

    def __getattr__(self, name):
        return getattr(in_tensors(), name)


class NamedTensors(Plain):
    tensors = ("names", "of files")


def overriding(base, *arguments):
    """Return a dataset of a subclass that overrides `__getitem__` with changed inputs."""

    class Override(base):
        def __getitem__(self, index):
            inputs, label = super().__getitem__(index)
            return inputs + 1, label

    return Override(*arguments)


@pytest.mark.parametrize(
    ("base", "arguments"),
    [
        (TensorDataset, in_tensors().tensors),
        (ListOfSamples, ()),
        (SeededBase, ()),
        (Proxy, ()),
        (NamedTensors, ()),
    ],
)
def test_fetch_prefers_the_method_of_the_most_derived_class(base, arguments):
    dataset = overriding(base, *arguments)
    batch = fetch(dataset, INDICES)
    assert torch.equal(batch[0], EXPECTED[0] + 1)
    assert torch.equal(batch[1], EXPECTED[1])


@pytest.mark.parametrize("make", [Proxy, NamedTensors])
def test_fetch_ignores_members_that_are_not_the_samples(make):
    assert all(map(torch.equal, fetch(make(), INDICES), EXPECTED))


def test_fetch_uses_getitems_of_a_tensor_dataset_subclass():
    class Doubled(TensorDataset):
        def __getitems__(self, indices):
            inputs, labels = self[indices]
            return 2 * inputs, labels

    batch = fetch(Doubled(*in_tensors().tensors), INDICES)
    assert torch.equal(batch[0], 2 * EXPECTED[0])


def test_fetch_collates_mappings():
    batch = fetch(Mappings(), INDICES)
    assert list(batch) == ["x", "y"]
    assert torch.equal(batch["x"], EXPECTED[0])
    assert torch.equal(batch["y"], EXPECTED[1])


def test_fetch_calls_getitems_once_with_ints():
    dataset = Batched()
    fetch(dataset, INDICES)
    assert dataset.asked == [4, 0, 7]
    assert all(type(index) is int for index in dataset.asked)


def test_fetch_reads_torch_subsets_in_batches():
    subset = torch.utils.data.Subset(Batched(), [8, 7, 6, 5, 4])
    batch = fetch(subset, torch.tensor([1, 4]))
    assert torch.equal(batch[1], torch.tensor([70, 40]))


def test_to_device_keeps_the_nesting():
    batch = {"a": [torch.ones(1), (torch.zeros(2), "text")], "b": 3}
    moved = to_device(batch, torch.device("cpu"))
    assert moved["a"][0] is batch["a"][0]
    assert type(moved["a"][1]) is tuple
    assert moved["a"][1][1] == "text"
    assert moved["b"] == 3


def test_fetch_collates_as_torch():
    samples = [Plain()[index] for index in INDICES.tolist()]
    assert all(map(torch.equal, fetch(Plain(), INDICES), default_collate(samples)))


# --- workers -------------------------------------------------------------------------------------


class Noisy:
    """A dataset whose samples are partly random, from all three generators."""

    def __init__(self, size=23, fails_at=None):
        self.size, self.fails_at = size, fails_at

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index == self.fails_at:
            raise OSError("the file system is unavailable")
        noise = random.random() + np.random.rand() + torch.rand(3)
        return noise + index, index


def stream(workers, *, size=1, rank=0, dataset=None):
    world = World(rank=rank, size=size)
    return TrainStream(dataset or Noisy(), world, seed=3, global_batch_size=6, workers=workers)


def first(batches, count):
    return [(batch[0].tolist(), batch[1].tolist(), cursor) for (batch,), cursor in
            islice(batches, count)]  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2])
def test_feed_is_independent_of_workers(workers):
    beginning = {"epoch": 0, "batch": 0}
    torch.manual_seed(0)
    expected = first(stream(0).batches(beginning), 7)
    before = torch.get_rng_state()
    assert first(stream(workers).batches(beginning), 7) == expected
    assert torch.equal(torch.get_rng_state(), before)  # the training's generator is untouched
    middle = expected[2][2]
    assert first(stream(workers).batches(middle), 4) == expected[3:]
    samples = EvalStream(Noisy(), World(), 5)
    ahead = EvalStream(Noisy(), World(), 5, workers)
    for (x, _), (other, _) in zip(samples.batches(), ahead.batches(), strict=True):
        assert torch.equal(x, other)


def test_random_samples_are_independent_of_ranks():
    beginning = {"epoch": 0, "batch": 0}
    alone = first(stream(0).batches(beginning), 4)
    ranks = [first(stream(0, size=3, rank=rank).batches(beginning), 4) for rank in range(3)]
    for step, (x, y, _) in enumerate(alone):
        assert [row for rank in ranks for row in rank[step][0]] == x
        assert [row for rank in ranks for row in rank[step][1]] == y


def test_feed_raises_worker_errors_at_the_request():
    batches = stream(1, dataset=Noisy(fails_at=4)).batches({"epoch": 0, "batch": 0})
    with pytest.raises(DataError, match=r"^sample 4 cannot be read: OSError: the file"):
        list(islice(batches, 4))


def test_feed_has_reports_readiness(tmp_path):
    gate = tmp_path / "gate"

    class Waiting(Noisy):
        def __getitem__(self, index):
            while not gate.exists():
                time.sleep(0.01)
            return super().__getitem__(index)

    batches = stream(1, dataset=Waiting()).batches({"epoch": 0, "batch": 0})
    assert not batches.has(1)
    gate.touch()
    until = time.monotonic() + 60
    while not batches.has(2):
        assert time.monotonic() < until
    next(batches)
    assert stream(0).batches({"epoch": 0, "batch": 0}).has(2)
    over = EvalStream(Noisy(size=5), World(), 5, 1).batches()
    list(over)
    assert over.has(1)  # the end
