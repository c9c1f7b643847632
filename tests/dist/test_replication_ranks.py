"""Data that divides itself by rank, on two ranks: rejected; the same data on both: accepted."""

import multiprocessing

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from trainer.cluster.world import World
from trainer.core.state import State
from trainer.data.replication import check_replicated
from trainer.data.source import EvalStream, TrainStream
from trainer.data.streams import Streamed, is_stream
from trainer.errors import ConfigError, DataError

SIZE, BATCH = 64, 8
INPUTS = torch.randn(SIZE, 5, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(SIZE) % 10
DATA = TensorDataset(INPUTS, LABELS)


class Stream(IterableDataset):
    """Every `step`-th sample from `first` on, in the order of `numbers`."""

    def __init__(self, first=0, step=1, numbers=range(SIZE)):
        self.numbers = list(numbers)[first::step]

    def __iter__(self):
        for number in self.numbers:
            yield INPUTS[number], int(LABELS[number])


class Noisy(Dataset):
    """Samples with noise from the dataset's own generator."""

    def __init__(self, numbers=range(SIZE), size=SIZE, seed=None):
        self.numbers, self.size = list(numbers), size
        self.generator = np.random.default_rng(seed)

    def __len__(self):
        return min(self.size, len(self.numbers))

    def __getitem__(self, index):
        number = self.numbers[index]
        noise = torch.from_numpy(self.generator.normal(size=5))
        return {"image": INPUTS[number] + noise, "name": f"{number}.png"}


class NoisyStream(Noisy, IterableDataset):
    def __iter__(self):
        return map(Noisy.__getitem__, [self] * len(self), range(len(self)))


class Random(IterableDataset):
    """A new order in each iteration, from the stream's own generator."""

    def __init__(self):
        self.generator = np.random.default_rng()

    def __iter__(self):
        return iter(Stream(numbers=self.generator.permutation(SIZE)))


class Constant(IterableDataset):
    def __iter__(self):
        for _ in range(SIZE):
            yield torch.ones(3), 1


class Graphs:
    """A part of a batch that has rows and no digest."""

    def __getitem__(self, rows):
        return self


def with_objects(samples):
    return {"name": [str(label) for _, label in samples], "graphs": Graphs()}


def shuffled(rank):
    return Stream(numbers=np.random.default_rng(rank).permutation(SIZE))


def sampler(rank, size, **settings):
    return DistributedSampler(DATA, size, rank, **settings)


def rows(**columns):
    from datasets import Dataset

    return Dataset.from_dict(columns).with_format("torch")


def shards(rank, size, *, streamed, shard_count=1):
    from datasets.distributed import split_dataset_by_node

    data = rows(x=INPUTS.tolist(), y=LABELS.tolist())
    if streamed:
        data = data.to_iterable_dataset(num_shards=shard_count)
    return split_dataset_by_node(data, rank, size)


def divided(rank, size):
    """Return training data that is not the same on every rank, by name."""
    return {
        "sampler, global batches": DataLoader(DATA, BATCH, sampler=sampler(rank, size)),
        "sampler, samples": DataLoader(DATA, None, sampler=sampler(rank, size)),
        "sampler, workers": DataLoader(
            DATA, BATCH, sampler=sampler(rank, size, shuffle=False), num_workers=1
        ),
        "stateful loader": StatefulDataLoader(DATA, BATCH, sampler=sampler(rank, size)),
        "sampler, objects": DataLoader(
            DATA, BATCH, sampler=sampler(rank, size), collate_fn=with_objects
        ),
        "modulo": Stream(rank, size),
        "modulo in a loader": DataLoader(Stream(rank, size), BATCH),
        "blocks": Stream(numbers=range(rank * SIZE // size, (rank + 1) * SIZE // size)),
        "modulo, unseeded noise": NoisyStream(range(rank, SIZE, size)),
        "order by rank": shuffled(rank),
        "own order": Random(),
        "rows of a node": shards(rank, size, streamed=False),
        "streamed rows of a node": shards(rank, size, streamed=True),
        "streamed files of a node": shards(rank, size, streamed=True, shard_count=4),
        "subset": Subset(DATA, range(rank, SIZE, size)),
        "subset of another length": Subset(DATA, range(rank, SIZE - 1, size)),
        "subset, unseeded noise": Noisy(range(rank, SIZE, size)),
        "prefix of another length": Subset(DATA, range(SIZE - rank)),
    }


def replicated(rank, size):
    """Return training data that is the same on every rank, by name."""
    torch.manual_seed(1)  # as before data is built from a configuration
    equal = torch.Generator().manual_seed(1)
    return {
        "dataset": DATA,
        "dataset, own noise": Noisy(),
        "dataset, own noise by rank": Noisy(seed=rank),
        "dataset of equal samples": TensorDataset(torch.ones(SIZE, 3)),
        "rows": rows(x=INPUTS.tolist()),
        "stream": Stream(),
        "stream, own noise": NoisyStream(),
        "stream of equal samples": Constant(),
        "stream, equal orders": shuffled(0),
        "loader, objects": DataLoader(DATA, BATCH, collate_fn=with_objects),
        "streamed rows": rows(x=INPUTS.tolist()).to_iterable_dataset(),
        "loader": DataLoader(DATA, BATCH, shuffle=True),
        "loader, own generator": DataLoader(DATA, BATCH, shuffle=True, generator=equal),
        "loader, workers": DataLoader(DATA, BATCH, shuffle=True, num_workers=1),
        "stateful loader": StatefulDataLoader(DATA, BATCH, shuffle=True),
        "loader, sampler of one rank": DataLoader(DATA, BATCH, sampler=sampler(0, 1)),
    }


def training(source, world, workers=0):
    kind = Streamed if is_stream(source) else TrainStream
    return kind(source, world, seed=5, global_batch_size=BATCH, accumulate=2, workers=workers)


def problem(data):
    """Return the message of the rejection, or an empty string."""
    try:
        check_replicated("mine.Data", data)
    except ConfigError as error:
        return str(error)
    return ""


def problems_of_training(world, make):
    multiprocessing.set_start_method("fork", force=True)  # as in a rank that a user starts
    return {
        (name, workers): problem(training(source, world, workers))
        for workers in (0, 2)
        for name, source in make(world.rank, world.size).items()
    }


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_divided_training_data_is_rejected_on_every_rank(on_ranks):
    first, second = on_ranks(2, problems_of_training, divided)
    assert first == second
    assert [name for name, text in first.items() if not text] == []
    assert "gives rank 1 other training samples than rank 0" in first["modulo", 0]
    assert "return a dataset with __len__" in first["modulo", 0]
    assert "32 training samples on rank 0 and 31 on rank 1" in first["subset of another length", 2]
    assert "Remove the division by rank (Subset" in first["rows of a node", 2]


def test_replicated_training_data_is_accepted(on_ranks):
    first, second = on_ranks(2, problems_of_training, replicated)
    assert first == second
    assert {name: text for name, text in first.items() if text} == {}


class Broken(Dataset):
    def __init__(self, rank):
        self.rank = rank

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        if self.rank == 1:
            raise OSError("stale file handle")
        return INPUTS[index]


def error_of_broken(world):
    try:
        check_replicated("mine.Data", training(Broken(world.rank), world))
    except DataError as error:
        return str(error)


def problems_of_evaluation(world):
    rank, size = world.rank, world.size
    sources = {
        "divided": Subset(DATA, range(rank, SIZE, size)),
        "divided rows": shards(rank, size, streamed=False),
        "one sample per rank": Subset(DATA, [rank]),
        "longer on rank 1": Subset(DATA, range(3 + rank)),
        "equal": DATA,
        "fewer samples than ranks": Subset(DATA, [0]),
        "own noise": Noisy(),
        "equal samples": TensorDataset(torch.ones(SIZE, 3)),
    }
    texts = {name: problem(EvalStream(source, world, 4)) for name, source in sources.items()}
    return texts, error_of_broken(world)


@pytest.mark.slow
def test_divided_evaluation_data_and_read_errors_are_raised_on_every_rank(on_ranks):
    (first, read_error), second = on_ranks(2, problems_of_evaluation)
    assert (first, read_error) == second
    rejected = [name for name, text in first.items() if text]
    assert rejected == ["divided", "divided rows", "one sample per rank", "longer on rank 1"]
    assert "other evaluation samples" in first["divided"]
    assert "stale file handle" in read_error


def test_check_on_one_rank_reads_nothing():
    class Closed(Dataset):
        def __len__(self):
            return SIZE

        def __getitem__(self, index):
            raise AssertionError("read")

    check_replicated("mine.Data", training(Closed(), World()))


def batches_after(world):
    """Return the training batches of this rank after a comparison, and without one."""

    def batches(source, *, compared):
        data = training(source, world)
        if compared:
            check_replicated("mine.Data", data)
        feed = data.batches(State().cursor, 12)  # more than an epoch
        return [[x.tolist() for x, *_ in microbatches] for microbatches, _ in feed]

    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    pairs = [
        (DATA, DATA),
        (Stream(), Stream()),
        (DataLoader(DATA, BATCH, shuffle=True), DataLoader(DATA, BATCH, shuffle=True)),
        tuple(
            DataLoader(DATA, BATCH, shuffle=True, generator=generator) for generator in generators
        ),
    ]
    return [
        batches(first, compared=True) == batches(second, compared=False) for first, second in pairs
    ]


@pytest.mark.slow
def test_comparison_leaves_the_position_unchanged(on_ranks):
    assert on_ranks(2, batches_after) == [[True] * 4] * 2
