"""MNIST in IDX files: intact, compressed, damaged and missing ones."""

import gzip
import struct

import numpy as np
import pytest
import torch

from trainer.data.mnist import Mnist, read_idx
from trainer.errors import DataError

NAMES = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
)  # fmt: skip


def idx(array):
    """Return an array as the bytes of an IDX file, as the format's description has them."""
    array = np.asarray(array, dtype=np.uint8)
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    return header + array.tobytes()


def images(count):
    return np.random.default_rng(count).integers(0, 256, (count, 4, 3))


CONTENTS = {
    NAMES[0]: idx(images(5)), NAMES[1]: idx([0, 1, 2, 3, 9]),
    NAMES[2]: idx(images(2)), NAMES[3]: idx([7, 0]),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A directory with four intact IDX files."""
    for name, data in CONTENTS.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_mnist_reads_idx_files(folder):
    source = Mnist(str(folder), mean=0.25, std=0.5)
    inputs, labels = source.train.tensors
    assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)
    expected = (images(5)[:, None] / 255 - 0.25) / 0.5
    np.testing.assert_allclose(inputs.numpy(), expected, atol=1e-6)
    assert labels.tolist() == [0, 1, 2, 3, 9]
    assert source.eval.tensors[0].shape == (2, 1, 4, 3)
    assert source.eval.tensors[1].tolist() == [7, 0]


def test_mnist_accepts_gz_files_and_dotted_names(folder):
    for name, data in CONTENTS.items():
        (folder / name).unlink()
        (folder / (name.replace("-idx", ".idx") + ".gz")).write_bytes(gzip.compress(data))
    source = Mnist(str(folder))
    assert source.train.tensors[1].tolist() == [0, 1, 2, 3, 9]
    assert source.eval.tensors[1].tolist() == [7, 0]


def cut(data):
    return data[:-1]


def longer(data):
    return data + b"\0"


def other_count(data):
    return data[:7] + b"\x06" + data[8:]


def other_magic(data):
    return b"\0\0\x0d" + data[3:]


def other_axes(data):
    return data[:3] + b"\x02" + data[4:]


def only_the_magic(data):
    return data[:4]


def nothing(data):
    return b""


@pytest.mark.parametrize(("damage", "text"), [
    (cut, "59 bytes of data, but its header specifies 5 x 4 x 3 = 60; it was truncated or altered"),
    (longer, "61 bytes of data, but its header specifies 5 x 4 x 3 = 60"),
    (other_count, "60 bytes of data, but its header specifies 6 x 4 x 3 = 72"),
    (other_magic, "begins with 00 00 0d 03; an IDX file of unsigned bytes with 3 axes begins with "
                  "00 00 08 03"),
    (other_axes, "begins with 00 00 08 02"),
    (only_the_magic, "begins with 00 00 08 03"),
    (nothing, "begins with ;"),
])  # fmt: skip
@pytest.mark.parametrize("compressed", [False, True])
def test_read_idx_reports_a_damaged_file_with_its_content(folder, damage, text, compressed):
    path = folder / NAMES[0]
    data = damage(CONTENTS[NAMES[0]])
    if compressed:
        path.unlink()
        path = folder / (NAMES[0] + ".gz")
        data = gzip.compress(data)
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        _ = Mnist(str(folder)).train
    assert str(caught.value).startswith(f"{path} ")
    assert text in str(caught.value)


def flipped(data):
    changed = bytearray(data)
    changed[len(data) // 2] ^= 0xFF
    return bytes(changed)


def not_deflated(data):
    return data[:10] + b"\xff" * len(data)


def not_gzip(data):
    return b"<html>404</html>"


@pytest.mark.parametrize("damage", [cut, flipped, not_deflated, not_gzip])
def test_read_idx_reports_a_damaged_gzip_file_with_advice(folder, damage):
    (folder / NAMES[3]).unlink()
    path = folder / (NAMES[3] + ".gz")
    path.write_bytes(damage(gzip.compress(CONTENTS[NAMES[3]])))
    with pytest.raises(DataError) as caught:
        _ = Mnist(str(folder)).eval
    assert str(path) in str(caught.value)
    assert "download it again" in str(caught.value)


def test_read_idx_rejects_a_huge_header_without_allocation(tmp_path):
    path = tmp_path / "huge"
    path.write_bytes(bytes([0, 0, 8, 3]) + b"\xff" * 12)
    with pytest.raises(DataError, match="truncated or altered"):
        read_idx(path, dims=3)


def test_mnist_rejects_unequal_images_and_labels(folder):
    (folder / NAMES[1]).write_bytes(idx([1, 2, 3]))
    with pytest.raises(DataError, match=r"has 5 images, .* 3 labels; the files do not match"):
        _ = Mnist(str(folder)).train


def test_mnist_rejects_labels_beyond_the_classes(folder):
    assert Mnist(str(folder), classes=10).train.tensors[1].max() == 9
    with pytest.raises(DataError, match=r"has the label 9, data\.classes is 9"):
        _ = Mnist(str(folder), classes=9).train


def test_mnist_missing_directory_names_the_sources(tmp_path):
    with pytest.raises(DataError) as caught:
        Mnist(str(tmp_path / "none"))
    assert f"data.dir={tmp_path / 'none'}: no such directory" in str(caught.value)
    assert "dataset-fashion-mnist" in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_mnist_missing_file_is_reported_before_training(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError) as caught:
        Mnist(str(folder))
    assert f"has neither {name} nor {name}.gz (it contains " in str(caught.value)
    assert "https://github.com/zalandoresearch/fashion-mnist" in str(caught.value)


def test_mnist_empty_directory_is_reported(tmp_path):
    with pytest.raises(DataError, match="it is empty"):
        Mnist(str(tmp_path))
