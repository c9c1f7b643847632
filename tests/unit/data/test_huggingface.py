"""Datasets of Hugging Face's library compared with their source rows, loaded and streamed."""

import builtins
import io
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.cluster.world import World
from trainer.data.huggingface import HuggingFace
from trainer.data.image_folder import ImageFolder
from trainer.data.source import TrainStream
from trainer.data.streams import Streamed
from trainer.errors import ConfigError, DataError

BEGINNING = {"epoch": 0, "batch": 0}
SIZE = 20
VALUES = {
    "x": [[float(n), -1.0] for n in range(SIZE)],
    "label": [n % 3 for n in range(SIZE)],
    "name": [("bus", "car", "tram")[n % 3] for n in range(SIZE)],
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Folder with a library cache and one dataset in several formats."""
    folder = tmp_path_factory.mktemp("huggingface")
    HuggingFace("json", data_files="x.json")  # imports it as we do
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        # The library waits for PyArrow's threads at the end of each shuffled reading.
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
        yield write(folder, datasets)


def write(folder, datasets):
    rows = datasets.Dataset.from_dict(VALUES)
    parts = {"train": rows, "test": rows.select(range(4))}
    datasets.DatasetDict(parts).save_to_disk(str(folder / "parts"))
    rows.save_to_disk(str(folder / "one"))
    for name, some in (("a", range(9)), ("b", range(9, SIZE))):
        rows.select(some).to_parquet(folder / f"{name}.parquet")
    rows.to_json(folder / "rows.json")
    pictures = []
    for n in range(SIZE):
        pixels = np.random.default_rng(n).integers(0, 256, (7, 9, 3)).astype(np.uint8)
        (folder / "pictures" / f"{n % 2}").mkdir(parents=True, exist_ok=True)
        path = folder / "pictures" / f"{n % 2}" / f"{n:02}.png"
        Image.fromarray(pixels).save(path)
        pictures.append((path.read_bytes(), n % 2))
    pictures.sort(key=lambda pair: pair[1])
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["zero", "one"])}
    )
    data = {"image": [p for p, _ in pictures], "label": [n for _, n in pictures]}
    datasets.Dataset.from_dict(data, features).to_parquet(folder / "pictures.parquet")
    torn = [*data["image"]]
    torn[5] = torn[5][:60]
    datasets.Dataset.from_dict({**data, "image": torn}, features).to_parquet(
        folder / "torn.parquet"
    )
    return folder


def source(library, path="parquet", files="[ab].parquet", **settings):
    arguments = {"input": "x", "cache_dir": str(library / "cache"), **settings}
    if files is not None:
        return HuggingFace(path, data_files=str(library / files), **arguments)
    return HuggingFace(str(library / path), **arguments)


def rows_of(part, count=SIZE):
    return [(x.tolist(), int(y)) for x, y in islice(iter(part), count)]


EXPECTED = list(zip(VALUES["x"], VALUES["label"], strict=True))


@pytest.mark.parametrize("settings", [
    {}, {"streaming": True}, {"path": "json", "files": "rows.json"},
    {"path": "json", "files": "rows.json", "streaming": True},
    {"path": "parts", "files": None}, {"path": "one", "files": None},
    {"path": "parts", "files": None, "streaming": True},
])  # fmt: skip
def test_huggingface_samples_are_the_rows_in_order(library, settings):
    data = source(library, **settings)
    part = data.train
    assert (
        rows_of(part if settings.get("streaming") else [part[n] for n in range(SIZE)]) == EXPECTED
    )
    if settings.get("path") == "parts":
        assert [data.eval[n][0].tolist() for n in range(len(data.eval))] == VALUES["x"][:4]
    else:
        assert data.eval is None


def test_huggingface_columns_give_dicts_and_transform_gives_anything(library):
    part = source(library, columns=["x", "name"]).train
    assert list(part[4]) == ["x", "name"]
    assert part[4]["x"].tolist() == [4.0, -1.0]
    assert part[4]["name"] == "car"

    def double(row):
        return torch.tensor(2 * row["label"])

    assert int(source(library, transform=double).train[5]) == 4


def test_huggingface_string_labels_become_indices(library):
    data = source(library, label="name", classes=3)
    assert data.classes == ["bus", "car", "tram"]
    assert [int(data.train[n][1]) for n in range(4)] == [0, 1, 2, 0]
    named = source(library, label="name", streaming=True, label_names=["tram", "car", "bus"])
    assert [y for _, y in rows_of(named.train, 3)] == [2, 1, 0]
    with pytest.raises(DataError, match=r"name them: data\.label_names"):
        _ = source(library, label="name", streaming=True).train
    with pytest.raises(ConfigError, match=r"set sample\.classes=3"):
        _ = source(library, label="name", classes=10).train


# --- order, resume -----------------------------------------------------------------------------


def read_batches(dataset, count, cursor=BEGINNING, *, rank=0, size=1, workers=0):
    stream = Streamed(dataset, World(rank, size), 5, 6, workers=workers)
    return [(x[:, 0].tolist(), after)
            for ((x, _),), after in islice(stream.batches(cursor), count)]  # fmt: skip


def without_state(items):
    """Return rows and cursors without stream states, which may differ after a resume."""
    return [(rows, after["epoch"], after["batch"]) for rows, after in items]


@pytest.mark.parametrize("buffer", [0, 5])
def test_row_stream_resumes_exactly_with_workers_and_ranks(library, buffer):
    def train():
        return source(library, streaming=True, shuffle_buffer=buffer, seed=3).train

    reference = read_batches(train(), 7)
    assert (reference[0][0] == [0, 1, 2, 3, 4, 5]) == (not buffer)
    assert all(len({n for rows, _ in reference[at : at + 3] for n in rows}) == 18 for at in (0, 3))
    assert (reference[0][0] == reference[3][0]) == (not buffer and reference[3][0][0] == 0)
    for at in range(6):
        assert without_state(read_batches(train(), 6 - at, reference[at][1])) == without_state(
            reference[at + 1 :]
        )
    assert ("source" in reference[0][1]) == (not buffer)  # a buffer's rows are in no state
    assert read_batches(train(), 7, workers=1) == reference
    assert without_state(read_batches(train(), 5, reference[1][1], workers=1)) == without_state(
        reference[2:]
    )
    per_rank = [read_batches(train(), 7, rank=rank, size=2) for rank in range(2)]
    for rows, *shares in zip(reference, *per_rank, strict=True):
        assert [n for part_ in shares for n in part_[0]] == rows[0]


def test_library_stream_is_accepted_as_data(library):
    import datasets

    def stream():
        files = str(library / "[ab].parquet")
        data = datasets.load_dataset("parquet", data_files=files, streaming=True, split="train")
        return data.map(lambda row: {"x": torch.tensor(row["x"])}).select_columns(["x"])

    def first(dataset, count, cursor=BEGINNING):
        feed = Streamed(dataset, World(), 5, 6).batches(cursor)
        return [(batch["x"], after) for (batch,), after in islice(feed, count)]

    reference = first(stream(), 5)
    rest = first(stream(), 3, reference[1][1])
    assert "source" in reference[1][1]
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(rest, reference[2:], strict=True))


# --- pictures ----------------------------------------------------------------------------------


def test_huggingface_images_match_image_folder(library):
    expected = ImageFolder(str(library / "pictures"), (3, 5, 5), eval_share=0).train
    for settings in ({}, {"streaming": True}, {"path": "imagefolder", "files": "pictures/**"}):
        arguments = {"files": "pictures.parquet", "input": "image", "shape": (3, 5, 5), **settings}
        data = source(library, **arguments, classes=2)
        part = data.train
        items = list(part) if settings.get("streaming") else [part[n] for n in range(SIZE)]
        assert all(torch.equal(x, expected[n][0]) for n, (x, _) in enumerate(items))
        assert [int(y) for _, y in items] == expected.labels.tolist()
        assert len(data.classes) == 2


def test_huggingface_transform_gets_decoded_images(library):
    data = source(library, files="pictures.parquet", transform=lambda row: row["image"].size)
    assert data.train[0] == (9, 7)


def test_huggingface_damaged_images_are_named_or_skipped(library):
    settings = {"files": "torn.parquet", "input": "image", "shape": (3, 5, 5)}
    rows, streamed = source(library, **settings).train, source(
        library, **settings, streaming=True
    ).train  # fmt: skip
    with pytest.raises(DataError, match=r"^sample 5 \(row 5.*\) cannot be read: "):
        next(TrainStream(rows, World(), 5, SIZE).batches(BEGINNING))
    feed = TrainStream(rows, World(), 5, SIZE, skip_damaged=True).batches(BEGINNING)
    next(feed)
    assert len(feed.take_damaged()) == 1
    with pytest.raises(DataError, match=r"^sample 5 of epoch 0 of the stream cannot be"):
        next(Streamed(streamed, World(), 5, 8).batches(BEGINNING))
    feed = Streamed(streamed, World(), 5, 8, skip_damaged=True).batches(BEGINNING)
    ((_, labels),), _ = next(feed)
    assert len(labels) == 8
    assert len(feed.take_damaged()) == 1


# --- rejected input ----------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "error", "text"), [
    ({"input": "y"}, DataError, r"data\.input=y: no such column \(valid: label, name, x\)"),
    ({"label": "labels"}, DataError, r"data\.label=labels: .* \(did you mean 'label'\?\)"),
    ({"columns": ["nmae"]}, DataError, r"data\.columns=nmae: .* \(did you mean 'name'\?\)"),
    ({"train": "trian"}, DataError, r"data\.train=trian: .* no such split \(did you mean 'train'"),
    ({"eval": "dev"}, DataError, r"data\.eval=dev: .* no such split \(valid: train\)"),
    ({"files": "none*.parquet"}, DataError, "datasets cannot load parquet .*none"),
    ({"files": "rows.json"}, DataError, "datasets cannot load parquet"),
    ({"path": "praquet"}, ConfigError, r"not a loader of local files \(did you mean 'parquet'\?\)"),
    ({"path": "none", "files": None}, ConfigError, "no such folder"),
    ({"path": "cache", "files": None}, DataError, "datasets cannot load"),
    ({"shuffle_buffer": 3}, ConfigError, r"needs data\.streaming=true"),
])  # fmt: skip
def test_huggingface_missing_names_are_reported_with_valid_ones(library, settings, error, text):
    (library / "cache").mkdir(exist_ok=True)
    with pytest.raises(error, match=text):
        both_parts(library, settings)


def both_parts(library, settings):
    data = source(library, **settings)
    return data.train, data.eval


def test_huggingface_without_the_library_names_the_package(library, monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name.startswith("datasets"):
            raise ImportError("no datasets")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match="pip install datasets"):
        source(library)


def test_decode_reads_in_memory_images_completely():
    from trainer.data.images import decode

    data = io.BytesIO()
    Image.new("P", (4, 3)).save(data, "GIF")
    assert decode(data.getvalue()).convert("RGB").size == (4, 3)
