"""Datasets of Hugging Face's library against the rows they were made of, whole and streamed."""

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
    """The library, with a cache of its own, and a folder with one dataset in several forms."""
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
    pictures.sort(key=lambda each: each[1])
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["zero", "one"])}
    )
    made = {"image": [p for p, _ in pictures], "label": [n for _, n in pictures]}
    datasets.Dataset.from_dict(made, features).to_parquet(folder / "pictures.parquet")
    torn = [*made["image"]]
    torn[5] = torn[5][:60]
    datasets.Dataset.from_dict({**made, "image": torn}, features).to_parquet(
        folder / "torn.parquet"
    )
    return folder


def source(library, path="parquet", files="[ab].parquet", **settings):
    given = {"input": "x", "cache_dir": str(library / "cache"), **settings}
    if files is not None:
        return HuggingFace(path, data_files=str(library / files), **given)
    return HuggingFace(str(library / path), **given)


def rows_of(part, count=SIZE):
    return [(x.tolist(), int(y)) for x, y in islice(iter(part), count)]


EXPECTED = list(zip(VALUES["x"], VALUES["label"], strict=True))


@pytest.mark.parametrize("settings", [
    {}, {"streaming": True}, {"path": "json", "files": "rows.json"},
    {"path": "json", "files": "rows.json", "streaming": True},
    {"path": "parts", "files": None}, {"path": "one", "files": None},
    {"path": "parts", "files": None, "streaming": True},
])  # fmt: skip
def test_samples_are_the_rows_in_order(library, settings):
    made = source(library, **settings)
    part = made.train
    assert (
        rows_of(part if settings.get("streaming") else [part[n] for n in range(SIZE)]) == EXPECTED
    )
    if settings.get("path") == "parts":
        assert [made.eval[n][0].tolist() for n in range(len(made.eval))] == VALUES["x"][:4]
    else:
        assert made.eval is None


def test_columns_make_dicts_and_a_transform_makes_anything(library):
    part = source(library, columns=["x", "name"]).train
    assert list(part[4]) == ["x", "name"]
    assert part[4]["x"].tolist() == [4.0, -1.0]
    assert part[4]["name"] == "car"

    def double(row):
        return torch.tensor(2 * row["label"])

    assert int(source(library, transform=double).train[5]) == 4


def test_labels_that_are_texts_become_numbers(library):
    made = source(library, label="name", classes=3)
    assert made.classes == ["bus", "car", "tram"]
    assert [int(made.train[n][1]) for n in range(4)] == [0, 1, 2, 0]
    named = source(library, label="name", streaming=True, label_names=["tram", "car", "bus"])
    assert [y for _, y in rows_of(named.train, 3)] == [2, 1, 0]
    with pytest.raises(DataError, match=r"name the classes: data\.label_names"):
        _ = source(library, label="name", streaming=True).train
    with pytest.raises(ConfigError, match=r"set sample\.classes=3"):
        _ = source(library, label="name", classes=10).train


# --- order, resume -----------------------------------------------------------------------------


def taken(dataset, count, cursor=BEGINNING, *, rank=0, size=1, workers=0):
    stream = Streamed(dataset, World(rank, size), 5, 6, workers=workers)
    return [(x[:, 0].tolist(), after)
            for ((x, _),), after in islice(stream.batches(cursor), count)]  # fmt: skip


def places(found):
    """Return rows and cursors; what a state says beside the place may differ after a resume."""
    return [(rows, after["epoch"], after["batch"]) for rows, after in found]


@pytest.mark.parametrize("buffer", [0, 5])
def test_a_stream_goes_on_exactly_with_workers_and_on_ranks(library, buffer):
    def train():
        return source(library, streaming=True, shuffle_buffer=buffer, seed=3).train

    whole = taken(train(), 7)
    assert (whole[0][0] == [0, 1, 2, 3, 4, 5]) == (not buffer)
    assert all(len({n for rows, _ in whole[at : at + 3] for n in rows}) == 18 for at in (0, 3))
    assert (whole[0][0] == whole[3][0]) == (not buffer and whole[3][0][0] == 0)
    for at in range(6):
        assert places(taken(train(), 6 - at, whole[at][1])) == places(whole[at + 1 :])
    assert ("source" in whole[0][1]) == (not buffer)  # a buffer's rows are in no state
    assert taken(train(), 7, workers=1) == whole
    assert places(taken(train(), 5, whole[1][1], workers=1)) == places(whole[2:])
    for rows, *shares in zip(whole, taken(train(), 7, size=2), taken(train(), 7, rank=1, size=2),
                             strict=True):  # fmt: skip
        assert [n for share in shares for n in share[0]] == rows[0]


def test_the_librarys_own_stream_can_be_the_data(library):
    import datasets

    def stream():
        files = str(library / "[ab].parquet")
        made = datasets.load_dataset("parquet", data_files=files, streaming=True, split="train")
        return made.map(lambda row: {"x": torch.tensor(row["x"])}).select_columns(["x"])

    def first(dataset, count, cursor=BEGINNING):
        feed = Streamed(dataset, World(), 5, 6).batches(cursor)
        return [(batch["x"], after) for (batch,), after in islice(feed, count)]

    whole = first(stream(), 5)
    rest = first(stream(), 3, whole[1][1])
    assert "source" in whole[1][1]
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(rest, whole[2:], strict=True))


# --- pictures ----------------------------------------------------------------------------------


def test_pictures_are_those_of_the_image_folder(library):
    wanted = ImageFolder(str(library / "pictures"), (3, 5, 5), eval_share=0).train
    for settings in ({}, {"streaming": True}, {"path": "imagefolder", "files": "pictures/**"}):
        given = {"files": "pictures.parquet", "input": "image", "shape": (3, 5, 5), **settings}
        made = source(library, **given, classes=2)
        part = made.train
        found = list(part) if settings.get("streaming") else [part[n] for n in range(SIZE)]
        assert all(torch.equal(x, wanted[n][0]) for n, (x, _) in enumerate(found))
        assert [int(y) for _, y in found] == wanted.labels.tolist()
        assert len(made.classes) == 2


def test_a_transform_gets_decoded_pictures(library):
    made = source(library, files="pictures.parquet", transform=lambda row: row["image"].size)
    assert made.train[0] == (9, 7)


def test_damaged_pictures_are_named_or_skipped(library):
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


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "error", "text"), [
    ({"input": "y"}, DataError, r"data\.input=y: there .* \(valid: label, name, x\)"),
    ({"label": "labels"}, DataError, r"data\.label=labels: .* \(did you mean 'label'\?\)"),
    ({"columns": ["nmae"]}, DataError, r"data\.columns=nmae: .* \(did you mean 'name'\?\)"),
    ({"train": "trian"}, DataError, r"data\.train=trian: .* no such split \(did you mean 'train'"),
    ({"eval": "dev"}, DataError, r"data\.eval=dev: .* no such split \(valid: train\)"),
    ({"files": "none*.parquet"}, DataError, "datasets cannot load parquet .*none"),
    ({"files": "rows.json"}, DataError, "datasets cannot load parquet"),
    ({"path": "praquet"}, ConfigError, r"no loader of local files \(did you mean 'parquet'\?\)"),
    ({"path": "none", "files": None}, ConfigError, "there is no such folder"),
    ({"path": "cache", "files": None}, DataError, "datasets cannot load"),
    ({"shuffle_buffer": 3}, ConfigError, r"is for data\.streaming=true"),
])  # fmt: skip
def test_what_is_not_there_is_named_with_what_is(library, settings, error, text):
    (library / "cache").mkdir(exist_ok=True)
    with pytest.raises(error, match=text):
        both_parts(library, settings)


def both_parts(library, settings):
    made = source(library, **settings)
    return made.train, made.eval


def test_without_the_library_it_is_said_what_to_install(library, monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name.startswith("datasets"):
            raise ImportError("no datasets")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match="pip install datasets"):
        source(library)


def test_a_picture_in_memory_is_decoded_completely():
    from trainer.data.images import decode

    data = io.BytesIO()
    Image.new("P", (4, 3)).save(data, "GIF")
    assert decode(data.getvalue()).convert("RGB").size == (4, 3)
