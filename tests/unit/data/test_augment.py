"""Random changes of images: what is done, and that it belongs to (seed, epoch, sample)."""

from itertools import islice

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trainer.cluster.world import World
from trainer.core import rng
from trainer.data.augment import ShiftedAndFlipped
from trainer.data.batches import fetch
from trainer.data.mnist import Mnist
from trainer.data.source import TrainStream

BEGINNING = {"epoch": 0, "batch": 0}
IMAGES = torch.rand(40, 2, 5, 4, generator=torch.Generator().manual_seed(0)) + 1
LABELS = torch.arange(40)
DATASET = ShiftedAndFlipped(IMAGES, LABELS, fill=-3.0)


def by_hand(image):
    """Return every picture that may be made of an image, as bytes."""
    padded = F.pad(image, (2, 2, 2, 2), value=-3.0)
    moved = [padded[:, y : y + 5, x : x + 4] for y in range(5) for x in range(5)]
    return {image_.contiguous().numpy().tobytes() for m in moved for image_ in (m, m.flip(-1))}


def test_augment_shifts_by_two_pixels_at_most_and_mirrors():
    possible, seen = by_hand(IMAGES[7]), set()
    for epoch in range(600):
        images, labels = fetch(DATASET, torch.tensor([7]), "train", 0, epoch)
        assert labels.tolist() == [7]
        seen.add(images[0].contiguous().numpy().tobytes())
    assert len(possible) == 50
    assert seen == possible


@pytest.mark.parametrize("workers", [0, 2])
def test_augment_depends_on_seed_epoch_and_sample_only(workers):
    stream = TrainStream(DATASET, World(), seed=3, global_batch_size=12, workers=workers)
    torch.manual_seed(1)
    before = rng.capture()
    expected = list(islice(stream.batches(BEGINNING), 7))
    assert all(map(torch.equal, rng.capture().values(), before.values()))
    for ((images, labels),), cursor in expected:
        epoch = cursor["epoch"] - (cursor["batch"] == 0)
        for image, label in zip(images, labels, strict=True):
            alone = fetch(DATASET, label[None], "train", 3, epoch)
            assert torch.equal(alone[0][0], image)
    ranks = [
        islice(TrainStream(DATASET, World(rank, 3), 3, 12, 2).batches(BEGINNING), 7)
        for rank in range(3)
    ]
    for (((images, _),), _), *shares in zip(expected, *ranks, strict=True):
        assert torch.equal(torch.cat([b[0] for pieces, _ in shares for b in pieces]), images)
    rest = TrainStream(DATASET, World(), 3, 12).batches(expected[2][1])
    for (((again, _),), _), (((images, _),), _) in zip(islice(rest, 4), expected[3:], strict=True):
        assert torch.equal(again, images)


def test_mnist_augments_training_images_only(folder_of_idx):
    plain = Mnist(folder_of_idx, mean=0.25, std=0.5)
    augmented = Mnist(folder_of_idx, mean=0.25, std=0.5, augment=True)
    assert torch.equal(augmented.eval.tensors[0], plain.eval.tensors[0])
    assert augmented.train.tensors[0].shape == plain.train.tensors[0].shape  # what build looks at
    images = fetch(augmented.train, torch.arange(5), "train", 0, 0)[0]
    for actual, image in zip(images, plain.train.tensors[0], strict=True):
        padded = F.pad(image, (2, 2, 2, 2), value=-0.5)  # black, as mean and std make it
        moved = [padded[:, y : y + 4, x : x + 3] for y in range(5) for x in range(5)]
        assert any(
            torch.equal(actual, image_) or torch.equal(actual, image_.flip(-1)) for image_ in moved
        )


@pytest.fixture
def folder_of_idx(tmp_path):
    """A folder with IDX files of five images to train on and two to evaluate."""
    for part, count in (("train", 5), ("t10k", 2)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 4, 3), dtype=np.uint8)
        axes = b"".join(n.to_bytes(4, "big") for n in pixels.shape)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(
            b"\0\0\x08\x03" + axes + pixels.tobytes()
        )
        labels = count.to_bytes(4, "big") + bytes(range(count))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + labels)
    return str(tmp_path)
