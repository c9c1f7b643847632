"""Samples that cannot be read: named and refused, or skipped and counted, whoever reads them."""

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
from trainer.data.image_folder import ImageFolder
from trainer.data.source import EvalStream, TrainStream, fetch, fetch_whole, lost_worker
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


class Whole(Points):
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
@pytest.mark.parametrize("kind", [Points, Whole])
def test_by_default_a_damaged_sample_is_named_and_ends_the_run(workers, kind):
    dataset = kind(broken=(17,))
    batches = TrainStream(dataset, World(), 5, 8, workers=workers).batches(BEGINNING)
    with pytest.raises(DataError) as caught:
        list(islice(batches, 10))
    text = str(caught.value)
    assert text.startswith("sample 17 (points/17.bin) cannot be read: OSError: the file is torn (")
    assert "test_damage.py:" in text
    assert text.endswith("trainer.on_damaged=skip")


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_skipped_samples_are_replaced_by_the_next_and_told_with_their_batch(size, workers):
    feeds = [
        TrainStream(Numbers(), World(rank, size), 5, 8, 2, workers, skip_damaged=True).batches(
            BEGINNING
        )
        for rank in range(size)
    ]
    for wanted, after in islice(order.global_batches(BEGINNING, seed=5, size=SIZE,
                                                     global_batch_size=8), 12):  # fmt: skip
        found = [next(feed) for feed in feeds]
        taken = torch.cat([torch.cat(pieces) for pieces, _ in found])
        assert taken.tolist() == [stand_in(index) for index in wanted.tolist()]
        assert {str(cursor) for _, cursor in found} == {str(after)}
        told = sorted(text.split(":")[0] for feed in feeds for text in feed.take_damaged())
        bad = [index for index in wanted.tolist() if index in BROKEN]
        assert told == sorted(f"sample {index} (points/{index}.bin)" for index in bad)


def test_random_choices_of_a_replacement_do_not_depend_on_who_reads():
    def read(rank, size, workers):
        stream = TrainStream(Points(), World(rank, size), 5, 8, 1, workers, skip_damaged=True)
        return [batch[0] for (batch,), _ in islice(stream.batches(BEGINNING), 6)]

    alone = read(0, 1, 0)
    assert all(map(torch.equal, read(0, 1, 2), alone))
    for x, *halves in zip(alone, read(0, 2, 0), read(1, 2, 0), strict=True):
        assert torch.equal(torch.cat(halves), x)


@pytest.mark.parametrize("workers", [0, 1])
def test_where_nothing_can_be_read_skipping_ends_too(workers):
    dataset = Points(broken=range(20, 40))
    stream = TrainStream(dataset, World(), 5, 8, workers=workers, skip_damaged=True)
    with pytest.raises(DataError, match="and the 9 after it cannot be read, which is no damaged"):
        list(islice(stream.batches(BEGINNING), 5))


def test_errors_that_are_not_a_samples_own_are_not_skipped():
    class Files(Points):
        def __getitem__(self, index):
            raise DataError("the shard is gone") if index == 3 else MemoryError

    class Shapes(Points):
        def __getitem__(self, index):
            return torch.zeros(index)

    for dataset, indices, error, text in (
        (Files(), [3], DataError, "^the shard is gone$"),
        (Files(), [4], MemoryError, None),
        (Shapes(), [4, 5], DataError, "equal size"),  # each can be read
    ):
        with pytest.raises(error, match=text):
            fetch_whole(dataset, torch.tensor(indices), skip=True, replace=True)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [list, tuple])
def test_samples_that_do_not_fit_together_are_refused_without_a_traceback(workers, kind):
    if kind is list:
        samples = [torch.zeros(2 + n % 2) for n in range(20)]
    else:
        samples = [{"a": 1}, {"b": 1}] * 10
    stream = TrainStream(samples, World(), 5, 8, workers=workers)
    with pytest.raises(DataError, match=r"^8 samples cannot become one batch: "):
        next(stream.batches(BEGINNING))


def test_a_sample_that_is_none_is_named_and_skipped_like_any_other():
    class Nothing(Points):
        def __getitem__(self, index):
            return None if index == 3 else torch.zeros(2)

    chosen = torch.tensor([2, 3])
    with pytest.raises(DataError, match=r"^sample 3 .* cannot be read: TypeError"):
        fetch_whole(Nothing(), chosen, skip=False, replace=True)
    batch, texts = fetch_whole(Nothing(), chosen, skip=True, replace=True)
    assert len(batch) == 2
    assert "sample 3 (points/3.bin): TypeError" in texts[0]


def test_memory_that_is_short_is_not_taken_for_shapes():
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    assert damage.unlike(2, error) is None


def test_rows_of_arrays_are_fetched_too():
    class Arrays:
        tensors = (np.arange(6), torch.arange(6))

    numbers, same = fetch(Arrays(), torch.tensor([4, 1]))
    assert numbers.tolist() == same.tolist() == [4, 1]


def test_a_name_that_is_no_text_is_told_in_one():
    class Named(Points):
        def describe(self, index):
            return os.fsdecode(b"caf\xe9.png")

    assert damage.name(Named(), 3) == r"sample 3 (caf\udce9.png)"


def test_a_dataset_that_says_nothing_of_its_samples_is_named_by_number():
    subset = Subset(Points(), range(10, 20))
    with pytest.raises(DataError, match=r"^sample 7 cannot be read: OSError"):
        fetch_whole(subset, torch.tensor([1, 7]), skip=False, replace=True)


# --- evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (2, 0), (1, 1)])
def test_an_evaluation_leaves_damaged_samples_out(size, workers):
    left, told = [], []
    for rank in range(size):
        stream = EvalStream(Numbers(), World(rank, size), 3, workers, skip_damaged=True)
        batches = stream.batches()
        for _ in range(len(stream)):
            batch = next(batches)
            left += [] if batch is None else batch.tolist()
        told += batches.take_damaged()
    assert sorted(left) == [index for index in range(SIZE) if index not in BROKEN]
    assert len(told) == len(BROKEN)
    with pytest.raises(DataError, match="sample 4 "):
        list(EvalStream(Numbers(), World(), 3).batches())


def test_a_rank_without_samples_of_its_own_gets_one_that_can_be_read():
    stream = EvalStream(Numbers(broken=(0, 1)), World(), 3, skip_damaged=True)
    assert stream.one().tolist() == [2]


# --- a whole run -------------------------------------------------------------------------------


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


class Says(Lines):
    def __init__(self):
        super().__init__()
        self.said = []

    def message(self, text):
        self.said.append(text)


def damaged_before(step):
    """Count by hand what a run has met."""
    batches = order.global_batches(BEGINNING, seed=5, size=SIZE, global_batch_size=BATCH)
    wanted = [index for indices, _ in islice(batches, step) for index in indices.tolist()]
    return sum(index in BROKEN for index in wanted)


def test_damaged_samples_are_counted_exactly_also_after_a_resume(tmp_path):
    tracker = Says()
    job = skipping(tracker)
    assert loop.train(job, state := State(), a_saver(tmp_path / "whole"), Stop(World()))
    counts = [line["damaged"] for line in tracker.of("train")]
    assert counts == [damaged_before(step) for step in range(1, 13)]
    assert state.damaged_samples == counts[-1] > 5
    assert [line["damaged"] for line in tracker.of("eval")] == [2.0, 2.0, 2.0]
    said = [text for text in tracker.said if text.startswith("SKIPPED")]
    assert len(said) == 5 + 2  # the first few, and those of the first evaluation
    first = skipping(max_steps=7)
    loop.train(first, State(), a_saver(tmp_path / "cut", every=Every(steps=3)), Stop(World()))
    second = skipping(again := Says())
    resumed, finished = go_on(tmp_path / "cut", second)
    assert finished
    assert everything(second, resumed) == everything(job, state)
    assert without_times(again.lines) == without_times(tracker.lines)[-len(again.lines) :]


def test_a_run_that_stops_at_damage_logs_no_count(tmp_path):
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
    whole = (tmp_path / "a" / "05.png").read_bytes()
    (tmp_path / "a" / "05.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "01.png").write_text("<html>404</html>")
    (tmp_path / "b" / "07.png").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_pictures_are_named_by_their_paths_or_skipped(pictures, workers):
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


def test_data_in_memory_is_not_asked_twice():
    dataset = TensorDataset(torch.arange(9))
    batch, texts = fetch_whole(dataset, torch.tensor([3, 1]), skip=True, replace=True)
    assert (batch[0].tolist(), texts) == ([3, 1], ())


def test_a_worker_that_was_killed_is_no_damaged_sample():
    said = "DataLoader worker (pid(s) 7) exited unexpectedly"
    assert not damage.is_damage(RuntimeError(said))
    assert said in str(lost_worker(RuntimeError(said)))
    assert damage.is_damage(RuntimeError("a picture of no size"))
    assert lost_worker(RuntimeError("a picture of no size")) is None
    assert lost_worker(ValueError(said)) is None
