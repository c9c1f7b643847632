"""OneFlow's folders: exact contents, and rejection of contradictory ones."""

import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.state_dicts import brought, oneflow_folder

from trainer.errors import CheckpointError
from trainer.importing import oneflow
from trainer.importing.formats import open_external

__all__ = ["brought"]


kinds = st.sampled_from([dtype for _, dtype in oneflow.KINDS.values()])
shapes = st.lists(st.integers(0, 5) | st.integers(0, 1 << 40), max_size=4).filter(
    lambda shape: len([dim for dim in shape if dim > 5]) < 2
)


# --- the text ----------------------------------------------------------------------------------


def test_text_is_the_one_that_oneflow_writes():
    expected = "shape {\n  dim: 64\n  dim: 784\n}\ndata_type: kFloat\n"
    assert oneflow.meta_text(torch.float32, (64, 784)) == expected
    assert oneflow.meta_text(torch.bool, ()) == "shape {\n}\ndata_type: kBool\n"


@settings(max_examples=100, deadline=None)
@given(kinds, shapes)
def test_written_text_is_parsed(dtype, shape):
    assert oneflow.parse_meta(oneflow.meta_text(dtype, tuple(shape))) == (dtype, tuple(shape))


@pytest.mark.parametrize("text", [
    "shape { dim: 64 dim: 784 } data_type: kFloat", "data_type: 2\nshape:{dim:64,dim:784;}",
    "shape<dim:[64,784]>data_type:kFloat", "shape { dim: 0x40 dim: 784 } data_type: kFloat",
    "# text\nshape {dim: 64 # axis\n dim: 784} data_type: 2",
])  # fmt: skip
def test_any_spelling_of_the_text_format_is_parsed(text):
    assert oneflow.parse_meta(text) == (torch.float32, (64, 784))


@pytest.mark.parametrize("text", [
    "", "shape {}", "data_type: kFloat", "shape { dim: -1 } data_type: kFloat",
    "shape { dim: 1.5 } data_type: kFloat", "shape { dim: 1 data_type: kFloat",
    "shape { dim: 1 } data_type: kFloat }", "shape { dim: 1 } shape { } data_type: kFloat",
    "shape { dim: 1 } data_type: kFloat data_type: kFloat", "shape { dim: 1 } data_type: kString",
    "shape { dim: 1 > data_type: kFloat", "shape { dim: 99999999999999999999 } data_type: kFloat",
    "shape { dim 1 } data_type: kFloat", "shape { size: 1 } data_type: kFloat",
    "shape { dim: [1 } data_type: kFloat", "shape { dim: 1 } data_type: 999", "shape: data_type",
    "shape { dim: 1x } data_type: kFloat", "shape { dim: 1 } data_type: kFloat \0", "{", "shape",
    "shape { dim: '1' } data_type: kFloat", "shape { dim: 1 } data_type: kInvalidDataType",
    "[type.googleapis.com/oneflow.ShapeProto] { dim: 1 }", "shape { dim: 1 } data_type: 0",
    "shape { " * 20_000,
])  # fmt: skip
def test_invalid_text_is_rejected(text):
    with pytest.raises(ValueError):
        oneflow.parse_meta(text)


@pytest.mark.parametrize("text", [
    "shape { dim: 9223372036854775807 dim: 2 } data_type: kFloat",
    "shape { dim: 0 dim: 9223372036854775807 dim: 9 } data_type: kFloat",
    "shape { " + "dim: 1 " * 65 + "} data_type: kFloat",
])  # fmt: skip
def test_impossible_shape_is_rejected(text):
    with pytest.raises(ValueError, match="the shape is too large"):
        oneflow.parse_meta(text)


@settings(max_examples=200, deadline=None)
@given(st.text("shape{}dim:[1, 6]data_type: kFloat<>;#\n", max_size=40) | st.text(max_size=40))
def test_any_text_is_parsed_or_rejected(text):
    try:
        dtype, shape = oneflow.parse_meta(text)
    except ValueError:
        return
    assert oneflow.parse_meta(oneflow.meta_text(dtype, shape)) == (dtype, shape)


def test_unsupported_dtype_is_named():
    with pytest.raises(CheckpointError, match=r"OneFlow does not support torch\.complex64"):
        oneflow.meta_text(torch.complex64, (1,))


def test_missing_protobuf_is_named_with_its_extra(tmp_path, monkeypatch):
    folder = oneflow_folder(tmp_path / "of", TENSORS)
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    oneflow._library.cache_clear()
    with pytest.raises(CheckpointError, match=r"need the library protobuf.*'perdure\[oneflow\]'"):
        open_external(str(folder))


# --- the folder --------------------------------------------------------------------------------

TENSORS = {
    "fc.weight": torch.arange(6.0).reshape(2, 3), "scalar": torch.tensor(7),
    "half": torch.randn(4).half(), "brain": torch.randn(4).bfloat16(), "empty": torch.empty(0, 3),
    "mask": torch.tensor([True, False]), "byte": torch.tensor([255], dtype=torch.uint8),
}  # fmt: skip


def test_folder_is_read_exactly_from_any_store(tmp_path, brought):
    source = open_external(brought(oneflow_folder(tmp_path / "of", TENSORS)))
    assert source.kind == "a folder of OneFlow variables"
    assert set(source.tensors) == set(source.paths) == set(TENSORS)
    assert (source.aliases, source.objects) == ({}, {})
    for name, expected in TENSORS.items():
        tensor = source.fetch(name)
        assert source.tensors[name] == (expected.dtype, tuple(expected.shape))
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
        assert torch.equal(tensor, expected), name
    with pytest.raises(CheckpointError, match="has no tensor 'absent'"):
        source.fetch("absent")


def test_unfinished_folder_is_rejected(tmp_path, brought):
    (oneflow_folder(tmp_path / "of", TENSORS) / "snapshot_done").unlink()
    with pytest.raises(CheckpointError, match="no snapshot_done, which is written last"):
        open_external(brought(tmp_path / "of"))


@pytest.mark.parametrize(("key", "content", "text"), [
    ("fc.weight/out", bytes(23), r"out has 23 bytes, but torch\.float32 \[2, 3\] needs 24"),
    ("fc.weight/out", bytes(25), "has 25 bytes"),
    ("fc.weight/meta", b"shape { dim: 6 } data_type: kDouble", "has 24 bytes, but .* needs 48"),
    ("fc.weight/meta", b"shape { dim: -6 } data_type: kFloat", "meta does not describe a variable"),
    ("fc.weight/meta", b"\xff\xfe", "meta does not describe a variable"),
    ("fc.weight/meta", b"#" * 70_000, "too long"),
    ("fc.weight/out", None, "fc.weight is missing out or meta"),
    ("fc.weight/meta", None, "fc.weight is missing out or meta"),
    ("other/text", b"what is this", "other is missing out or meta"),
])  # fmt: skip
def test_variable_that_contradicts_its_metadata_is_rejected(tmp_path, brought, key, content, text):
    path = oneflow_folder(tmp_path / "of", TENSORS) / key
    if content is None:
        path.unlink()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        open_external(brought(tmp_path / "of"))


def test_invalid_boolean_bytes_are_rejected(tmp_path):
    (oneflow_folder(tmp_path / "of", TENSORS) / "mask" / "out").write_bytes(b"\x01\x02")
    with pytest.raises(CheckpointError, match="bytes other than 0 and 1"):
        open_external(str(tmp_path / "of")).fetch("mask")


def test_file_truncated_during_the_read_is_rejected(tmp_path):
    source = open_external(str(oneflow_folder(tmp_path / "of", TENSORS)))
    (tmp_path / "of" / "fc.weight" / "out").write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated during the read"):
        source.fetch("fc.weight")


@pytest.mark.parametrize("name", ["..", ".", "a\\b", ""])
def test_no_variable_lies_outside_of_the_folder(name):
    class Hostile:
        """A store that lists what no folder can hold."""

        url = "s3://bucket/of"

        def __getattr__(self, asked):
            raise AssertionError(f"{asked} was called")

    with pytest.raises(CheckpointError, match=re.escape(repr(name))):
        oneflow.OneflowFolder("s3://bucket/of", Hostile(), ["snapshot_done", f"{name}/"])
