"""Image folders: discovery, conversion to tensors, rejected input."""

import builtins
import errno
import os
import random
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.cluster.world import World
from trainer.core import rng
from trainer.data.image_folder import ImageFolder
from trainer.data.images import Transform, _center_crop, _random_crop, decode
from trainer.data.source import EvalStream, TrainStream
from trainer.errors import ConfigError, DataError

BEGINNING = {"epoch": 0, "batch": 0}
CLASSES = ["bus", "car", "train"]


def draw(path, number, size=(9, 7), mode="RGB"):
    """Write a picture that is another for each number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": 3, "L": 1, "RGBA": 4}[mode]
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], channels))
    Image.fromarray(pixels.astype(np.uint8).squeeze(), mode).save(path)


def fill(root, count=6, classes=CLASSES):
    for label, name in enumerate(classes):
        for n in range(count):
            draw(root / name / f"{n}.png", 100 * label + n)
    return root


@pytest.fixture
def parts(tmp_path):
    """A folder with `train` and `val`."""
    fill(tmp_path / "train")
    fill(tmp_path / "val", 2)
    return tmp_path


def paths(part):
    return [part.describe(n) for n in range(len(part))]


# --- what is found -----------------------------------------------------------------------------


def test_image_folder_classes_are_sorted_folders(parts):
    source = ImageFolder(str(parts), (3, 7, 9), classes=3)
    assert source.classes == CLASSES
    assert (len(source.train), len(source.eval)) == (18, 6)
    assert source.train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    expected = [str(parts / "train" / name / f"{n}.png") for name in CLASSES for n in range(6)]
    assert paths(source.train) == expected
    image, label = source.train[7]
    assert (image.shape, image.dtype, label.dtype) == ((3, 7, 9), torch.float32, torch.int64)
    pixels = np.asarray(Image.open(expected[7])) / 255
    assert np.allclose(image.permute(1, 2, 0).numpy(), (pixels - 0.5) / 0.5, atol=1e-6)


def test_image_folder_finds_only_images_at_any_depth(tmp_path):
    fill(tmp_path / "train", 1)
    draw(tmp_path / "train" / "bus" / "old" / "deep.JPG", 1)
    draw(tmp_path / "train" / "bus" / ".thumbnails" / "x.png", 2)
    (tmp_path / "train" / "bus" / "notes.txt").write_text("x")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    source = ImageFolder(str(tmp_path), eval_share=0)
    assert source.classes == CLASSES
    names = [path.removeprefix(f"{tmp_path}/train/") for path in paths(source.train)]
    assert names == ["bus/0.png", "bus/old/deep.JPG", "car/0.png", "train/0.png"]
    assert source.eval is None


def test_image_folder_does_not_follow_link_loops(tmp_path):
    fill(tmp_path / "all", count=2, classes=["a"])
    fill(tmp_path / "elsewhere", count=3, classes=["more"])
    (tmp_path / "all/a/deep").mkdir()
    (tmp_path / "all/a/deep/again").symlink_to(tmp_path / "all/a")
    (tmp_path / "all/a/deep/itself").symlink_to(".")
    (tmp_path / "all/a/deep/nothing").symlink_to("nothing")
    (tmp_path / "all/a/more").symlink_to(tmp_path / "elsewhere/more")
    for number in range(9):  # each way goes through either folder once
        (tmp_path / f"elsewhere/more/{number}").symlink_to(tmp_path / "all/a")
    source = ImageFolder(str(tmp_path / "all"), eval_share=0.0)
    assert [path.removeprefix(f"{tmp_path}/all/a/") for path in paths(source.train)] == [
        "0.png", "1.png", "more/0.png", "more/1.png", "more/2.png",
    ]  # fmt: skip


@pytest.mark.parametrize("closed", ["", "a", "a/deep"])
def test_image_folder_reports_unreadable_folders(tmp_path, closed, monkeypatch):
    fill(tmp_path, count=2, classes=["a"])
    fill(tmp_path / "a", count=2, classes=["deep"])
    scan = os.scandir

    def deny(path="."):  # root may read everything
        if os.path.realpath(path) == os.path.realpath(tmp_path / closed):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", deny)
    monkeypatch.setattr(os, "listdir", lambda path: [entry.name for entry in deny(path)])
    with pytest.raises(DataError, match=rf"{closed} cannot be read: Permission denied"):
        ImageFolder(str(tmp_path), eval_share=0.0).train  # noqa: B018 (it lists)


def test_image_folder_eval_split_depends_on_names_only(tmp_path):
    fill(tmp_path, 40)  # one of the classes is called train, and has no folders
    source = ImageFolder(str(tmp_path), eval_share=0.25)
    train, evaluated = set(paths(source.train)), set(paths(source.eval))
    assert not train & evaluated
    assert len(train | evaluated) == 120
    assert 15 <= len(evaluated) <= 45
    for n in range(40, 60):  # more images: the split stays
        draw(tmp_path / "car" / f"{n}.png", n)
    more = ImageFolder(str(tmp_path), eval_share=0.25)
    assert train <= set(paths(more.train))
    assert evaluated <= set(paths(more.eval))
    elsewhere = shutil.copytree(tmp_path, tmp_path.with_name("elsewhere"))
    moved = ImageFolder(str(elsewhere), eval_share=0.25)
    assert [p.replace("elsewhere", tmp_path.name) for p in paths(moved.eval)] == paths(more.eval)


# --- rejected input ----------------------------------------------------------------------------


def test_image_folder_rejects_unusable_folders_with_advice(parts):
    (parts / "train" / "tram").mkdir()
    with pytest.raises(DataError, match=r"is missing tram, and has unexpected nothing"):
        _ = ImageFolder(str(parts)).train
    (parts / "val" / "tram").mkdir()
    with pytest.raises(DataError, match=r"train/tram has no images \(it is empty\)"):
        _ = ImageFolder(str(parts)).train
    for part in ("train", "val"):
        (parts / part / "tram").rmdir()
    with pytest.raises(
        ConfigError, match=r"3 classes \(bus, car, train\), .* set sample\.classes=3"
    ):
        _ = ImageFolder(str(parts), classes=10).train


def test_image_folder_missing_directory_lists_its_parent(parts):
    with pytest.raises(DataError, match=rf"no such directory \({parts} contains train, val\)"):
        ImageFolder(str(parts / "trian"))
    (parts / "empty").mkdir()
    with pytest.raises(DataError, match=r"no class folders \(it is empty\)"):
        _ = ImageFolder(str(parts / "empty")).train


def test_image_folder_rejects_an_eval_share_that_leaves_nothing(tmp_path):
    fill(tmp_path, 1)
    with pytest.raises(DataError, match=r"no images to evaluate on: .* has 3 images; raise"):
        _ = ImageFolder(str(tmp_path), eval_share=1e-9).train
    with pytest.raises(DataError, match="leaves no images to train on of bus, car, train"):
        _ = ImageFolder(str(tmp_path), eval_share=1 - 1e-9).train


def test_image_folder_without_pillow_names_the_package(parts, monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name.startswith("PIL"):
            raise ImportError("no PIL")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match="pip install pillow"):
        ImageFolder(str(parts))


@pytest.mark.parametrize(("arguments", "text"), [
    ({"shape": [8, 8]}, r"sample\.shape=\[8, 8\] is not an image shape"),
    ({"shape": [2, 8, 8]}, "with 1, 3 or 4 channels"),
    ({"mean": [0.1, 0.2]}, r"=\[0\.1, 0\.2\] has 2 numbers, sample\.shape has 3 channels"),
    ({"std": 0.0}, r"data\.std=0\.0 must be larger than 0"),
    ({"crop_share": 0.0}, "must be above 0"),
    ({"eval_share": 1.0}, "below 1"),
])  # fmt: skip
def test_image_folder_rejects_arguments_out_of_range(parts, arguments, text):
    with pytest.raises(ConfigError, match=text):
        ImageFolder(str(parts), **arguments)


# --- pictures as tensors -----------------------------------------------------------------------


def test_transform_center_crop_matches_pillow(tmp_path):
    draw(tmp_path / "x.png", 5, size=(50, 30))
    picture = Image.open(tmp_path / "x.png")
    tensor = Transform((3, 10, 10), 0.0, 1.0, crop_share=0.8)(picture, training=False)
    box = (13, 3, 37, 27)  # 0.8 of the 30 that are in the middle
    expected = np.asarray(picture.resize((10, 10), Image.Resampling.BILINEAR, box=box)) / 255
    assert np.allclose(tensor.permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert _center_crop((50, 30), (20, 10), 1.0) == (0, 2.5, 50, 27.5)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_transform_converts_any_mode_to_the_requested_channels(tmp_path, mode, channels):
    draw(tmp_path / "x.png", 5, mode=mode)
    mean, std = [0.1, 0.2, 0.3, 0.4][:channels], [0.5, 0.6, 0.7, 0.8][:channels]
    picture = Image.open(tmp_path / "x.png")
    tensor = Transform((channels, 7, 9), mean, std)(picture, training=True)
    kind = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    pixels = np.asarray(picture.convert(kind)).reshape(7, 9, channels) / 255
    assert np.allclose(tensor.permute(1, 2, 0).numpy(), (pixels - mean) / std, atol=1e-6)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_transform_16_bit_grey_is_as_bright_as_8_bit(tmp_path, name):
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(eight).save(tmp_path / "eight.png")
    Image.fromarray(eight.astype(np.uint16) * 257).save(tmp_path / name)
    for channels in (1, 3):
        transform = Transform((channels, 16, 16))
        expected = transform(decode(tmp_path / "eight.png"), training=False)
        assert torch.equal(transform(decode(tmp_path / name), training=False), expected)


@pytest.mark.parametrize(("kind", "text"), [(np.float32, "floats"), (np.int32, "integers")])
def test_transform_rejects_32_bit_pixels(tmp_path, kind, text):
    path = tmp_path / "a" / "a.tif"
    path.parent.mkdir()
    Image.fromarray(np.ones((9, 7), kind)).save(path)
    source = ImageFolder(str(tmp_path), (1, 7, 9), eval_share=0.0)
    with pytest.raises(DataError, match=rf"a/a\.tif\) cannot be read: .*32-bit {text}"):
        next(TrainStream(source.train, World(), 0, 1).batches(BEGINNING))


def test_transform_applies_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4), "red").save(tmp_path / "x.jpg", exif=exif)
    tensor = Transform((3, 8, 4), 0.0, 1.0)(Image.open(tmp_path / "x.jpg"), training=False)
    assert tensor.shape == (3, 8, 4)
    assert float(tensor[0].min()) > 0.9


def test_transform_pad_crop_shifts_and_flip_mirrors():
    picture = Image.fromarray(np.arange(1, 65, dtype=np.uint8).reshape(8, 8))
    transform = Transform((1, 8, 8), 0.0, 1 / 255, augment="pad_crop", flip=True)
    padded = np.pad(np.asarray(picture), 1)
    moved = [padded[y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    possible = {image_.tobytes() for m in moved for image_ in (m, np.ascontiguousarray(m[:, ::-1]))}
    seen = set()
    for seed in range(300):
        random.seed(seed)
        tensor = transform(picture, training=True)[0].round().numpy().astype(np.uint8)
        seen.add(tensor.tobytes())
    assert seen == possible
    plain = transform(picture, training=False)[0].round().numpy()
    assert np.array_equal(plain, np.asarray(picture))


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (500, 3), (1, 1)])
def test_random_crop_is_inside_the_image_with_a_bounded_aspect(size):
    for seed in range(200):
        random.seed(seed)
        x, y, right, bottom = _random_crop(size)
        assert x >= 0
        assert y >= 0
        assert right <= size[0]
        assert bottom <= size[1]
        assert 0.5 < (right - x) / (bottom - y) < 2
        if size != (500, 3):
            assert (right - x) * (bottom - y) >= 0.05 * size[0] * size[1]


# --- order and resume --------------------------------------------------------------------------


def read_samples(batches, count):
    return [(x.numpy().tobytes(), y.tolist(), after)
            for ((x, y),), after in islice(batches, count)]  # fmt: skip


def test_augmentation_is_independent_of_workers_ranks_and_resume(parts):
    augmented = ImageFolder(str(parts), (3, 6, 6), augment="resized_crop", flip=True)
    dataset = augmented.train
    expected = read_samples(TrainStream(dataset, World(), 1, 6).batches(BEGINNING), 7)
    assert len({x for x, _, _ in expected}) == 7
    before = rng.capture()
    ahead = TrainStream(dataset, World(), 1, 6, workers=2)
    assert read_samples(ahead.batches(BEGINNING), 7) == expected
    assert read_samples(ahead.batches(expected[3][2]), 3) == expected[4:]
    assert all(map(torch.equal, rng.capture().values(), before.values()))
    ranks = [
        read_samples(TrainStream(dataset, World(r, 2), 1, 6).batches(BEGINNING), 4) for r in (0, 1)
    ]
    for (x, y, _), *shares in zip(expected, *ranks, strict=False):
        assert b"".join(part_[0] for part_ in shares) == x
        assert [label for part_ in shares for label in part_[1]] == y
    plain = ImageFolder(str(parts), (3, 6, 6)).eval
    for (x, _), (other, _) in zip(
        EvalStream(augmented.eval, World(), 4).batches(),
        EvalStream(plain, World(), 4).batches(), strict=True,
    ):  # fmt: skip
        assert torch.equal(x, other)
