"""Streams against lists: the order on any number of ranks, exact resume, damage, other loaders."""

import os
import random
import signal
import subprocess
import sys
from functools import partial
from itertools import chain, islice
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from support.loop_jobs import BEGINNING, DATA, a_job, a_saver, everything, go_on, without_times
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from trainer.checkpoint import values
from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.core import rng
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.data import position
from trainer.data.streams import Streamed, is_stream
from trainer.errors import DataError
from trainer.training import loop

# torchdata 0.11 with torch 2.13
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

ROOT = Path(__file__).resolve().parents[3]
SIZE, BATCH = 23, 6
PER_EPOCH = 3


class Numbers(IterableDataset):
    """Its samples are (epoch, number, something random); counts how many it has given."""

    def __init__(self, size=SIZE):
        self.size, self.epoch, self.served = size, 0, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for number in range(self.size):
            self.served += 1
            yield self.sample(number)

    def sample(self, number):
        noise = random.random() + torch.rand(()).item()
        return torch.tensor([self.epoch, number, noise], dtype=torch.float64)


class Stateful(Numbers):
    """The same with a state dict."""

    at = begin = 0

    def __iter__(self):
        self.at, self.begin = self.begin, 0
        while self.at < self.size:
            self.served += 1
            self.at += 1
            yield self.sample(self.at - 1)

    def state_dict(self):
        return {"at": self.at, "tensor": torch.tensor(self.at), "keys": {1: (2, None)}}

    def load_state_dict(self, state):
        assert int(state["tensor"]) == state["at"]
        assert state["keys"] == {1: (2, None)}
        self.begin = state["at"]


class Mute(Stateful):
    """Its state is nothing that a checkpoint could hold."""

    def state_dict(self):
        return {"at": object()}


def read_batches(
    source, count, cursor=BEGINNING, *, rank=0, size=1, accumulate=1, workers=0, **settings
):
    stream = Streamed(source, World(rank, size), 5, BATCH, accumulate, workers, **settings)
    return [
        (torch.cat(pieces).tolist(), after)
        for pieces, after in islice(stream.batches(cursor), count)
    ]


def joined(ranks):
    """Return the global batches that ranks have together."""
    together = []
    for step in zip(*ranks, strict=True):
        assert len({str(after) for _, after in step}) == 1
        together.append(([row for rows, _ in step for row in rows], step[0][1]))
    return together


# --- order -------------------------------------------------------------------------------------


def test_epoch_is_one_pass_without_the_incomplete_batch():
    result = read_batches(Numbers(), 7)
    assert [[int(row[1]) for row in rows] for rows, _ in result] == [
        list(range(6 * (n % 3), 6 * (n % 3) + 6)) for n in range(7)
    ]
    assert [{int(row[0]) for row in rows} for rows, _ in result] == [{n // 3} for n in range(7)]
    assert [after for _, after in result] == [
        {"epoch": (n + 1) // 3, "batch": (n + 1) % 3} for n in range(7)
    ]
    assert [after for _, after in read_batches(Numbers(size=18), 3)] == [
        after for _, after in result[:3]
    ]


@pytest.mark.parametrize("kind", [Numbers, Stateful])
@pytest.mark.parametrize(("size", "accumulate"), [(2, 1), (3, 1), (3, 2), (1, 3)])
def test_global_batches_are_the_same_on_any_number_of_ranks(kind, size, accumulate):
    ranks = [read_batches(kind(), 8, rank=r, size=size, accumulate=accumulate) for r in range(size)]
    assert joined(ranks) == read_batches(kind(), 8)


@pytest.mark.parametrize("kind", [Numbers, Stateful])
def test_stream_with_workers_reads_ahead_in_one_process(kind):
    before = rng.capture()
    assert read_batches(kind(), 8, workers=3) == read_batches(kind(), 8)
    assert all(map(torch.equal, rng.capture().values(), before.values()))


def test_is_stream_accepts_restartable_iterables_only():
    plain = TensorDataset(torch.arange(3))
    yes = (Numbers(), DataLoader(plain), StatefulDataLoader(plain), {1, 2}, Rows(range(3)))
    spent = (iter([1, 2]), (n for n in range(3)), map(abs, [1]), Rows(iter([1, 2])))
    no = (plain, [1, 2], 3, torch.utils.data.Subset(plain, [0]), *spent)
    assert all(map(is_stream, yes))
    assert not any(map(is_stream, no))


class Rows:
    """Iterable whose iterators are those of its rows."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class ReadOnce(IterableDataset):
    """Dataset with a single iterator for all epochs."""

    def __init__(self, wrap):
        self.rows = wrap(iter(torch.arange(SIZE)[:, None]))

    def __iter__(self):
        return self.rows


@pytest.mark.parametrize("wrap", [
    iter, partial(map, torch.clone), zip, lambda rows: islice(rows, SIZE), chain,
])  # fmt: skip
def test_dataset_that_cannot_start_over_is_named_in_the_second_epoch(wrap):
    feed = Streamed(ReadOnce(wrap), World(), 5, BATCH).batches(BEGINNING)
    assert len(list(islice(feed, PER_EPOCH))) == PER_EPOCH
    with pytest.raises(DataError, match=r"epoch 1 of the stream has 0 samples.*iter\(\) starts"):
        next(feed)


# --- resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Numbers, Stateful, Mute])
@pytest.mark.parametrize("workers", [0, 1])
def test_stream_from_any_cursor_continues_identically(kind, workers):
    reference = read_batches(kind(), 8)
    for at, (_, cursor) in enumerate(reference[:-1]):
        if workers and at not in (1, 2):
            continue
        source = kind()
        assert read_batches(source, 7 - at, cursor, workers=workers) == reference[at + 1 :]


def test_stream_with_state_is_not_read_again_and_without_it_a_message_is_given():
    for kind, read_again in ((Stateful, 0), (Numbers, 2 * BATCH), (Mute, 2 * BATCH)):
        stream = Streamed(kind(), World(), 5, BATCH)
        cursor = read_batches(kind(), 2)[1][1]
        next(stream.batches(cursor))
        assert stream.dataset.served == SIZE - 2 * BATCH + read_again
        text = stream.rereads(cursor)
        assert text == "" if not read_again else "12 samples of epoch 0 are read again" in text
        assert stream.rereads(BEGINNING) == ""


def test_loader_workers_that_are_not_restored_are_reported():
    for workers, message in ((0, ""), (2, "random choices in the DataLoader's own workers")):
        stream = Streamed(loader(num_workers=workers), World(), 5, BATCH)
        assert stream.rereads({"epoch": 0, "batch": 2, "source": {}}).startswith(message)
        assert bool(stream.rereads({"epoch": 0, "batch": 2, "source": {}})) == bool(message)


def test_position_state_survives_strict_json_with_its_types():
    source = Stateful()
    state = position.capture(source)
    assert values.decode(values.encode(state, "x")) == state  # as a checkpoint stores it
    position.restore(source, state)
    tensors = {
        "a": torch.rand(2, 3), "b": torch.tensor(True), "c": torch.zeros(0, 2),
        "d": [torch.tensor(3, dtype=torch.bfloat16), (1, "x")], "e": torch.get_rng_state(),
    }  # fmt: skip
    result = position._decode_tensors(values.decode(
        values.encode(position._encode_tensors(tensors), "x")
    ))  # fmt: skip
    for key in "abce":
        assert torch.equal(result[key], tensors[key])
        assert result[key].dtype == tensors[key].dtype
    assert torch.equal(result["d"][0], tensors["d"][0])
    assert result["d"][1] == (1, "x")


def test_position_rejected_state_is_a_data_error():
    with pytest.raises(DataError, match="cannot load its state from the checkpoint: KeyError"):
        read_batches(Stateful(), 1, {"epoch": 0, "batch": 1, "source": {}})


def a_run(folder, steps):
    """Train on a stream up to a step, resuming the run in its folder."""
    job = a_job(data=Streamed(Points(), World(), 5, 8), max_steps=steps, eval_every=Every(epochs=1))
    state, finished = go_on(folder, job, every=Every(steps=2))
    assert finished
    return job, state


class Points(Stateful):
    """Samples as the task wants them."""

    def sample(self, number):
        inputs, labels = DATA.train[number]
        return inputs + 0.1 * torch.rand(6), labels


def test_run_on_a_stream_resumes_exactly(tmp_path):
    reference, state = a_run(tmp_path / "reference", 8)
    for cut in (2, 3):  # at the end of an epoch, and in the middle of one
        a_run(tmp_path / str(cut), cut)
        rest, resumed = a_run(tmp_path / str(cut), 8)
        assert everything(rest, resumed) == everything(reference, state)
        assert without_times(rest.tracker.lines) == without_times(
            [line for line in reference.tracker.lines if line["step"] > cut]
        )
    assert (state.epoch, state.step) == (4, 8)


def test_max_epochs_ends_a_run_on_a_stream(tmp_path):
    job = a_job(data=Streamed(Points(), World(), 5, 8), max_steps=100, max_epochs=2)
    assert loop.train(job, state := State(), a_saver(tmp_path), Stop(World()))
    assert state.step == 4


# --- rejected input ----------------------------------------------------------------------------


def test_epoch_without_a_complete_batch_is_an_error():
    with pytest.raises(
        DataError, match="epoch 0 of the stream has 0 samples, fewer than one global"
    ):
        read_batches(Numbers(size=0), 1)
    with pytest.raises(DataError, match="has 5 samples, fewer than one global batch of 6"):
        read_batches(Numbers(size=5), 1, workers=1)
    with pytest.raises(
        DataError, match="ends after 8 samples, before batch 2 from which this run resumes"
    ):
        read_batches(Numbers(size=8), 1, {"epoch": 0, "batch": 2})

    class Once(Numbers):
        def __iter__(self):
            return super().__iter__() if self.epoch == 0 else iter(())

    with pytest.raises(DataError, match="epoch 1 of the stream has 0 samples"):
        read_batches(Once(), 4)


class Torn(IterableDataset):
    """Iterator that continues after an error."""

    def __init__(self, broken, size=SIZE):
        self.broken, self.size = broken, size

    def __iter__(self):
        return map(self.sample, range(self.size))

    def sample(self, number):
        if number in self.broken:
            raise OSError("torn")
        return torch.tensor([number])


class TornGenerator(Torn):
    def __iter__(self):
        for number in range(self.size):
            yield self.sample(number)


class BehindMap(TornGenerator):
    def __iter__(self):
        return map(torch.clone, islice(super().__iter__(), 100))


class BehindClass(TornGenerator):
    class Rows:
        def __init__(self, rows):
            self.rows = rows

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.rows)

    def __iter__(self):
        return self.Rows(super().__iter__())


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_damage_is_named_or_skipped(workers):
    with pytest.raises(
        DataError, match=r"^sample 7 of epoch 0 of the stream cannot be read: OSError"
    ):
        read_batches(Torn((7, 8)), 2, workers=workers)
    skipped = {"skip_damaged": True, "workers": workers}
    result = read_batches(Torn((7, 8)), 4, **skipped)
    numbers = [row[0] for rows, _ in result for row in rows]
    assert numbers[:18] == [n for n in range(20) if n not in (7, 8)]
    ranks = [read_batches(Torn((7, 8)), 4, rank=r, size=2, **skipped) for r in range(2)]
    assert joined(ranks) == result
    dead_ones = [kind((7,)) for kind in (TornGenerator, BehindMap, BehindClass)]
    cut_off = Torn((SIZE - 1,))  # a generator that failed here would end in the same way
    for dead in (*dead_ones, DataLoader(dead_ones[0], batch_size=None), cut_off):
        with pytest.raises(DataError, match="ended with this error, as generators do"):
            read_batches(dead, PER_EPOCH + 1, **skipped)
    with pytest.raises(DataError, match="and the 9 after it cannot be read"):
        read_batches(Torn(range(7, 30), size=40), 2, **skipped)


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_damage_in_the_dropped_batch_is_reported_with_the_last_one(workers):
    per_epoch = (SIZE - 1) // BATCH
    for rank in range(2):
        source = Torn((SIZE - 2,))
        feed = Streamed(source, World(rank, 2), 5, BATCH, workers=workers, skip_damaged=True)
        feed = feed.batches(BEGINNING)
        for epoch in range(2):
            list(islice(feed, per_epoch - 1))
            assert feed.take_damaged() == []
            next(feed)
            texts = feed.take_damaged()
            assert [f"sample {SIZE - 2} of epoch {epoch}" in text for text in texts] == (
                [True] if rank == 0 else []
            )


def test_stream_damage_is_reported_by_rank_0_only():
    texts = []
    for rank in range(2):
        stream = Streamed(Torn((7, 8)), World(rank, 2), 5, BATCH, skip_damaged=True)
        feed = stream.batches(BEGINNING)
        list(islice(feed, 2))
        texts += feed.take_damaged()
    assert len(texts) == 2


# --- loaders that make batches themselves ------------------------------------------------------


def loader(**settings):
    rng.seed_all(0)  # as build.py does before it makes the data
    dataset = TensorDataset(torch.arange(SIZE)[:, None])
    served = {"batch_size": BATCH, "shuffle": True, "collate_fn": flat, **settings}
    return StatefulDataLoader(dataset, **served)


def flat(samples):
    return default_collate(samples)[0]


def first_of(sample):
    return sample[0]


@pytest.mark.parametrize("settings", [
    {}, {"num_workers": 2}, {"drop_last": True}, {"shuffle": False},
    {"batch_size": None, "collate_fn": first_of},
])  # fmt: skip
def test_stateful_loader_resumes_from_any_batch(settings):
    reference = read_batches(loader(**settings), 8)
    for epoch in (reference[:3], reference[3:6]):
        assert len({row[0] for rows, _ in epoch for row in rows}) == 18
    assert (reference[0][0] == reference[3][0]) == ("shuffle" in settings)  # shuffled anew
    for at in (1, 2) if "num_workers" in settings else (0, 1, 2, 4):
        rest = read_batches(loader(**settings), 7 - at, reference[at][1])
        assert [rows for rows, _ in rest] == [rows for rows, _ in reference[at + 1 :]]
        assert [after["batch"] for _, after in rest] == [a["batch"] for _, a in reference[at + 1 :]]
    if "num_workers" not in settings:
        assert (
            joined([read_batches(loader(**settings), 8, rank=r, size=3) for r in range(3)])
            == reference
        )


def test_first_batch_leaves_generators_unchanged():
    source = loader()
    stream = Streamed(source, World(), 5, BATCH)
    first = stream.first()
    assert read_batches(source, 4) == read_batches(loader(), 4)
    assert torch.cat(first).tolist() == read_batches(loader(), 1)[0][0]


def test_first_batch_leaves_no_worker_of_a_loader():
    before = active_children()
    Streamed(loader(num_workers=2), World(), 5, BATCH).first()
    assert active_children() == before


def test_plain_loader_is_shuffled_by_seed_and_epoch_and_read_again():
    def source():
        return DataLoader(TensorDataset(torch.arange(SIZE)[:, None]), BATCH, shuffle=True,
                          collate_fn=flat)  # fmt: skip

    reference = read_batches(source(), 8)
    torch.manual_seed(999)
    assert read_batches(source(), 5, reference[2][1]) == reference[3:]
    assert reference[0][0] != reference[3][0]
    assert "source" not in reference[1][1]


def test_loader_batches_of_another_size_are_rejected():
    with pytest.raises(DataError, match="returned a batch of 4 samples, but a global batch has 6"):
        read_batches(loader(batch_size=4), 1)

    batches = [[0, 1, 2, 3, 4, 5], [6], [7]]  # the incomplete one is not the last
    with pytest.raises(DataError, match="returned a batch of 1 samples"):
        read_batches(DataLoader(TensorDataset(torch.arange(8)), batch_sampler=batches), 1)


def test_rows_of_any_nested_batch_are_divided():
    class Rows:
        def __len__(self):
            return SIZE

        def __getitem__(self, index):
            return {"x": torch.tensor([index]), "pair": (index, str(index))}

    result = []
    for rank in range(2):
        source = DataLoader(Rows(), batch_size=BATCH)
        stream = Streamed(source, World(rank, 2), 5, BATCH)
        (piece,), _ = next(stream.batches(BEGINNING))
        assert piece["x"][:, 0].tolist() == piece["pair"][0].tolist()
        assert [int(text) for text in piece["pair"][1]] == piece["x"][:, 0].tolist()
        result += piece["x"][:, 0].tolist()
    assert result == list(range(6))


def test_stop_signals_do_not_end_loader_workers():
    feed = Streamed(loader(num_workers=1), World(), 5, BATCH).batches(BEGINNING)
    next(feed)
    for child in active_children():
        os.kill(child.pid, signal.SIGTERM)
    assert len(list(islice(feed, 3))) == 3


ENDS = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from trainer.data.source import TrainStream
from trainer.data.streams import Streamed
from trainer.cluster.world import World

dataset, beginning = TensorDataset(torch.arange(8)), {"epoch": 0, "batch": 0}
loader = DataLoader(dataset, batch_size=4, num_workers=1)
feeds = [
    Streamed(loader, World(), 0, 4).batches(beginning),
    TrainStream(dataset, World(), 0, 4, workers=1).batches(beginning),
]
print([next(feed)[1] for feed in feeds])
"""


def test_process_exits_although_its_workers_ignore_signals():
    done = subprocess.run(
        [sys.executable, "-c", ENDS], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("'batch': 1") == 2
