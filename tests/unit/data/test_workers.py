"""Errors of data workers outside of the dataset's code: each reaches the rank, none is lost."""

import os
import resource
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from trainer.cluster.world import World
from trainer.core.state import State
from trainer.data import limits
from trainer.data.source import EvalStream, TrainStream
from trainer.data.streams import Streamed
from trainer.data.workers import start_workers
from trainer.errors import ConfigError, DataError

SIZE, BATCH, BAD = 48, 4, 17

NOT_PICKLABLE = {
    "lambda": lambda: lambda: None,
    "generator": lambda: (number for number in range(3)),
    "lock": threading.Lock,
    "file": lambda: open(os.devnull),  # noqa: SIM115
    "gradient": lambda: torch.ones(3, requires_grad=True) * 2,
}


class Batches(Dataset):
    """Batches of `tensors` tensors; `act` is called with each batch before it is sent."""

    def __init__(self, act=lambda batch: None, tensors=1):
        self.act, self.count = act, tensors

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return index

    def __getitems__(self, indices):
        batch = {f"x{n}": torch.tensor(indices) + 0.0 for n in range(self.count)}
        self.act(batch)
        return batch


def add(make, batch):
    """Add an object to the batch of sample `BAD`."""
    if BAD in batch["x0"].tolist():
        batch["extra"] = {"deep": [make()]}


def feed_of(kind, batches, workers):
    if kind == "evaluation":
        return EvalStream(batches, World(), BATCH, workers).batches()
    if kind == "training":
        return TrainStream(batches, World(), 5, BATCH, workers=workers).batches(State().cursor)
    loader = DataLoader(
        batches, BATCH, collate_fn=_unchanged, num_workers=workers,
        persistent_workers=kind == "persistent loader" and workers > 0,
    )  # fmt: skip
    return Streamed(loader, World(), 5, BATCH).batches(State().cursor)


def _unchanged(batch):
    return batch


def values(feed, count=SIZE // BATCH + 2):
    """Return the samples of up to `count` batches, and the message of the error that ends them."""
    samples, text = [], ""
    try:
        for item in islice(feed, count):
            batch = item if isinstance(item, dict) else item[0][0]
            samples.append(batch["x0"].tolist())
    except (ConfigError, DataError) as error:
        text = f"{type(error).__name__}: {error}"
    return samples, text


KINDS = ["training", "evaluation", "loader", "persistent loader"]


@pytest.mark.parametrize("name", NOT_PICKLABLE)
@pytest.mark.parametrize("kind", KINDS)
def test_batch_that_cannot_be_sent_is_the_error_of_that_batch(kind, name, capfd):
    expected, _ = values(feed_of(kind, Batches(), 0))
    received, text = values(feed_of(kind, Batches(partial(add, NOT_PICKLABLE[name])), 2))
    assert text.startswith("DataError: a data worker cannot send a batch to its rank: ")
    assert received == expected[: len(received)]
    assert all(BAD not in batch for batch in received)
    assert "Traceback" not in capfd.readouterr().err


def limit_descriptors(count):
    """Let this process open `count` more files; return its limits before."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    free = (number for number in range(before[1]) if number not in used)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(islice(free, count, None)), before[1]))
    return before


@contextmanager
def descriptors_left(count):
    before = limit_descriptors(count)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def leave(count, batch):
    """Leave a worker `count` descriptors, from the batch of sample `BAD` on."""
    if BAD in batch["x0"].tolist():
        limit_descriptors(count)


def is_advice(text):
    return text.startswith("ConfigError: too many open files") and "ulimit -n" in text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 8, 13, 21])
def test_worker_without_descriptors_ends_the_reading_with_advice(kind, count, capfd):
    expected, _ = values(feed_of(kind, Batches(), 0))
    received, text = values(feed_of(kind, Batches(partial(leave, count), tensors=5), 2))
    assert received == expected[: len(received)]
    assert len(received) == len(expected) or is_advice(text)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8, 13])
def test_rank_without_descriptors_ends_the_reading_with_advice(kind, count):
    expected, _ = values(feed_of(kind, Batches(), 0))
    feed = feed_of(kind, Batches(tensors=5), 2)
    received, _ = values(feed, 1)
    with descriptors_left(count):
        rest, text = values(feed, len(expected) - 1)
    received += rest
    assert received == expected[: len(received)]
    assert len(received) == len(expected) or is_advice(text)


def test_workers_that_cannot_be_started_are_reported_with_advice():
    def start():
        with descriptors_left(0):
            os.pipe()

    with pytest.raises(ConfigError, match="too many open files"):
        start_workers(start)


def test_start_raises_the_limit_of_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        start_workers(lambda: None)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits.descriptors(), hard)
        assert limits.descriptors() >= min(soft, 65_536)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


READS = """
import torch
from torch.utils.data import TensorDataset
from trainer.cluster.world import World
from trainer.core.state import State
from trainer.data.source import TrainStream
from trainer.errors import ConfigError

data = TrainStream(TensorDataset(torch.ones(64, 50_000)), World(), 5, 8, workers=2)
try:
    for number, _ in zip(range(16), data.batches(State().cursor)):
        pass
    print("complete")
except ConfigError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small /dev/shm")
@pytest.mark.parametrize(("size", "word"), [
    ("4k", "--shm-size"), ("64k", "--shm-size"), ("3m", "--shm-size"), ("64m", "complete"),
])  # fmt: skip
def test_small_shared_memory_is_reported_with_advice(size, word):
    command = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", command, sys.executable, READS],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert word in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
