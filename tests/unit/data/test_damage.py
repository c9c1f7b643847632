"""Unreadable samples: reported by name, or skipped and counted, in any reading process."""

import os
import random
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from support.loop_jobs import (
    BATCH,
    BEGINNING,
    Lines,
    a_job,
    a_saver,
    everything,
    go_on,
    without_times,
)
from torch.utils.data import Subset, TensorDataset

from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.data import damage, order
from trainer.data.batches import fetch, fetch_readable
from trainer.data.image_folder import ImageFolder
from trainer.data.source import EvalStream, TrainStream
from trainer.data.workers import lost_worker
from trainer.errors import DataError
from trainer.training import loop

SIZE, BROKEN = 43, (4, 5, 17, 42)


class Points:
    """Random samples; some of them cannot be read."""

    def __init__(self, broken=BROKEN, size=SIZE):
        self.broken, self.size = broken, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("the file is torn")
        return torch.rand(6) + random.random(), torch.tensor(index % 3)

    def describe(self, index):
        return f"points/{index}.bin"


class BatchPoints(Points):
    """The same, as batches."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Numbers(Points):
    """Samples that are their own numbers."""

    def __getitem__(self, index):
        super().__getitem__(index)
        return torch.tensor(index)


def stand_in(index, broken=BROKEN):
    """Return the sample that is taken for one, by the rule: the next one that can be read."""
    while index in broken:
        index = (index + 1) % SIZE
    return index


# --- one after the other -----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Points, BatchPoints])
def test_damaged_sample_by_default_ends_the_run_by_name(workers, kind):
    dataset = kind(broken=(17,))
    batches = TrainStream(dataset, World(), 5, 8, workers=workers).batches(BEGINNING)
    with pytest.raises(DataError) as caught:
        list(islice(batches, 10))
    text = str(caught.value)
    assert text.startswith("sample 17 (points/17.bin) cannot be read: OSError: the file is torn (")
    assert "test_damage.py:" in text
    assert text.endswith("trainer.on_damaged=skip")


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_skipped_samples_are_replaced_and_reported_with_their_batch(size, workers):
    feeds = [
        TrainStream(Numbers(), World(rank, size), 5, 8, 2, workers, skip_damaged=True).batches(
            BEGINNING
        )
        for rank in range(size)
    ]
    for expected, after in islice(order.global_batches(BEGINNING, seed=5, size=SIZE,
                                                     global_batch_size=8), 12):  # fmt: skip
        items = [next(feed) for feed in feeds]
        indices_read = torch.cat([torch.cat(pieces) for pieces, _ in items])
        assert indices_read.tolist() == [stand_in(index) for index in expected.tolist()]
        assert {str(cursor) for _, cursor in items} == {str(after)}
        texts = sorted(text.split(":")[0] for feed in feeds for text in feed.take_damaged())
        bad = [index for index in expected.tolist() if index in BROKEN]
        assert texts == sorted(f"sample {index} (points/{index}.bin)" for index in bad)


def test_replacement_randomness_is_independent_of_the_reader():
    def read(rank, size, workers):
        stream = TrainStream(Points(), World(rank, size), 5, 8, 1, workers, skip_damaged=True)
        return [batch[0] for (batch,), _ in islice(stream.batches(BEGINNING), 6)]

    alone = read(0, 1, 0)
    assert all(map(torch.equal, read(0, 1, 2), alone))
    for x, *halves in zip(alone, read(0, 2, 0), read(1, 2, 0), strict=True):
        assert torch.equal(torch.cat(halves), x)


@pytest.mark.parametrize("workers", [0, 1])
def test_skip_ends_if_nothing_is_readable(workers):
    dataset = Points(broken=range(20, 40))
    stream = TrainStream(dataset, World(), 5, 8, workers=workers, skip_damaged=True)
    with pytest.raises(DataError, match="and the 9 after it cannot be read: check the dataset"):
        list(islice(stream.batches(BEGINNING), 5))


def test_errors_not_caused_by_a_sample_are_not_skipped():
    class Files(Points):
        def __getitem__(self, index):
            raise DataError("the shard is missing") if index == 3 else MemoryError

    class Shapes(Points):
        def __getitem__(self, index):
            return torch.zeros(index)

    for dataset, indices, error, text in (
        (Files(), [3], DataError, "^the shard is missing$"),
        (Files(), [4], MemoryError, None),
        (Shapes(), [4, 5], DataError, "equal size"),  # each can be read
    ):
        with pytest.raises(error, match=text):
            fetch_readable(dataset, torch.tensor(indices), skip=True, replace=True)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [list, tuple])
def test_samples_of_different_shapes_are_a_data_error(workers, kind):
    if kind is list:
        samples = [torch.zeros(2 + n % 2) for n in range(20)]
    else:
        samples = [{"a": 1}, {"b": 1}] * 10
    stream = TrainStream(samples, World(), 5, 8, workers=workers)
    with pytest.raises(DataError, match=r"^8 samples cannot become one batch: "):
        next(stream.batches(BEGINNING))


def test_none_sample_is_named_and_skipped():
    class Nothing(Points):
        def __getitem__(self, index):
            return None if index == 3 else torch.zeros(2)

    indices = torch.tensor([2, 3])
    with pytest.raises(DataError, match=r"^sample 3 .* cannot be read: TypeError"):
        fetch_readable(Nothing(), indices, skip=False, replace=True)
    batch, texts = fetch_readable(Nothing(), indices, skip=True, replace=True)
    assert len(batch) == 2
    assert "sample 3 (points/3.bin): TypeError" in texts[0]


def test_out_of_memory_is_not_reported_as_a_shape_mismatch():
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    assert damage.mismatch(2, error) is None


def test_fetch_reads_rows_of_arrays():
    class Arrays:
        tensors = (np.arange(6), torch.arange(6))

    numbers, same = fetch(Arrays(), torch.tensor([4, 1]))
    assert numbers.tolist() == same.tolist() == [4, 1]


def test_describe_escapes_paths_that_are_not_utf8():
    class Named(Points):
        def describe(self, index):
            return os.fsdecode(b"caf\xe9.png")

    assert damage.describe(Named(), 3) == r"sample 3 (caf\udce9.png)"


def test_describe_without_method_uses_the_number():
    subset = Subset(Points(), range(10, 20))
    with pytest.raises(DataError, match=r"^sample 7 cannot be read: OSError"):
        fetch_readable(subset, torch.tensor([1, 7]), skip=False, replace=True)


# --- evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (2, 0), (1, 1)])
def test_evaluation_leaves_damaged_samples_out(size, workers):
    readable_rows, texts = [], []
    for rank in range(size):
        stream = EvalStream(Numbers(), World(rank, size), 3, workers, skip_damaged=True)
        batches = stream.batches()
        for _ in range(len(stream)):
            batch = next(batches)
            readable_rows += [] if batch is None else batch.tolist()
        texts += batches.take_damaged()
    assert sorted(readable_rows) == [index for index in range(SIZE) if index not in BROKEN]
    assert len(texts) == len(BROKEN)
    with pytest.raises(DataError, match="sample 4 "):
        list(EvalStream(Numbers(), World(), 3).batches())


def test_rank_without_samples_gets_a_readable_one():
    stream = EvalStream(Numbers(broken=(0, 1)), World(), 3, skip_damaged=True)
    assert stream.one().tolist() == [2]


# --- a complete run -----------------------------------------------------------------------------


class Source:
    train, eval = Points(), Points(broken=(3, 9), size=23)


def skipping(tracker=None, **changes):
    return a_job(
        dataset=Source,
        data=TrainStream(Source.train, World(), 5, BATCH, skip_damaged=True),
        evaluation=EvalStream(Source.eval, World(), 5, skip_damaged=True),
        tracker=tracker or Lines(),
        eval_every=Every(steps=5),
        **changes,
    )


class RecordedMessages(Lines):
    def __init__(self):
        super().__init__()
        self.messages = []

    def message(self, text):
        self.messages.append(text)


def damaged_before(step):
    """Count by hand what a run has met."""
    batches = order.global_batches(BEGINNING, seed=5, size=SIZE, global_batch_size=BATCH)
    expected = [index for indices, _ in islice(batches, step) for index in indices.tolist()]
    return sum(index in BROKEN for index in expected)


def test_damaged_samples_are_counted_exactly_after_a_resume(tmp_path):
    tracker = RecordedMessages()
    job = skipping(tracker)
    assert loop.train(job, state := State(), a_saver(tmp_path / "whole"), Stop(World()))
    counts = [line["damaged"] for line in tracker.of("train")]
    assert counts == [damaged_before(step) for step in range(1, 13)]
    assert state.damaged_samples == counts[-1] > 5
    assert [line["damaged"] for line in tracker.of("eval")] == [2.0, 2.0, 2.0]
    messages = [text for text in tracker.messages if text.startswith("SKIPPED")]
    assert len(messages) == 5 + 2  # the first few, and those of the first evaluation
    first = skipping(max_steps=7)
    loop.train(first, State(), a_saver(tmp_path / "cut", every=Every(steps=3)), Stop(World()))
    second = skipping(again := RecordedMessages())
    resumed, finished = go_on(tmp_path / "cut", second)
    assert finished
    assert everything(second, resumed) == everything(job, state)
    assert without_times(again.lines) == without_times(tracker.lines)[-len(again.lines) :]


def test_run_that_stops_at_damage_logs_no_count(tmp_path):
    job = a_job(max_steps=2)
    loop.train(job, State(), a_saver(tmp_path), Stop(World()))
    assert all("damaged" not in line for line in job.tracker.lines)


# --- real damage -------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Pictures of two classes, three of them damaged: cut off, no picture at all, and empty."""
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for n in range(12):
            pixels = np.random.default_rng(n).integers(0, 256, (9, 9, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{n:02}.png")
    data = (tmp_path / "a" / "05.png").read_bytes()
    (tmp_path / "a" / "05.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "b" / "01.png").write_text("<html>404</html>")
    (tmp_path / "b" / "07.png").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_named_by_path_or_skipped(pictures, workers):
    dataset = ImageFolder(str(pictures), (3, 6, 6), eval_share=0).train
    batches = TrainStream(dataset, World(), 0, 24, workers=workers).batches(BEGINNING)
    with pytest.raises(
        DataError, match=r"sample \d+ \(.*/(a/05|b/01|b/07)\.png\) cannot be read: "
    ):
        next(batches)
    skipping = TrainStream(dataset, World(), 0, 24, workers=workers, skip_damaged=True)
    ((images, labels),), _ = next(feed := skipping.batches(BEGINNING))
    assert (len(images), len(feed.take_damaged())) == (24, 3)
    assert sorted(labels.tolist()) == [0] * 12 + [1] * 12


def test_in_memory_data_is_read_once():
    dataset = TensorDataset(torch.arange(9))
    batch, texts = fetch_readable(dataset, torch.tensor([3, 1]), skip=True, replace=True)
    assert (batch[0].tolist(), texts) == ([3, 1], ())


def test_killed_worker_is_not_a_damaged_sample():
    messages = "DataLoader worker (pid(s) 7) exited unexpectedly"
    assert not damage.is_damage(RuntimeError(messages))
    assert messages in str(lost_worker(RuntimeError(messages)))
    assert damage.is_damage(RuntimeError("a picture of no size"))
    assert lost_worker(RuntimeError("a picture of no size")) is None
    assert lost_worker(ValueError(messages)) is None
