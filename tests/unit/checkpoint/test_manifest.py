"""Checkpoint manifest: golden bytes, round trips, damage, and the division of tensors."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from support.manifests import GOLDEN, GOLDEN_V1, parsed_golden, rejection, sample, sealed

from trainer.checkpoint import manifest
from trainer.checkpoint.box import Box
from trainer.checkpoint.manifest import TensorEntry

# --- the format ----------------------------------------------------------------------------------


def test_to_bytes_matches_golden_manifest():
    assert manifest.to_bytes(sample()) == GOLDEN.read_bytes()


def test_from_bytes_reads_golden_manifest():
    assert manifest.from_bytes(GOLDEN.read_bytes(), "golden") == sample()


def test_from_bytes_reads_golden_manifest_of_version_1():
    """The same checkpoint as version 1 stored it, which knew neither lists of files nor F8_E8M0."""
    expected = sample()
    tensors = {**expected.tensors, "model.sharded": TensorEntry("F32", (5, 2), grid=(4, 1))}
    del tensors["model.replicated"]
    objects = {key: value for key, value in expected.objects.items() if key != "large"}
    files = {name: replace(file, checksums_checksum="") for name, file in expected.files.items()}
    assert manifest.from_bytes(GOLDEN_V1.read_bytes(), "golden") == replace(
        expected, tensors=tensors, objects=objects, files=files, version=1
    )


def test_golden_manifest_is_json_with_checksum_last():
    data = GOLDEN.read_bytes()
    body = data[: data.index(b',\n"checksum"')]
    top = json.loads(data)
    assert list(top)[-1] == "checksum"
    assert top["checksum"] == xxhash.xxh3_64_hexdigest(body)
    assert (top["format"], top["version"], top["algorithm"]) == (
        "perdure-checkpoint",
        2,
        "xxh3_64",
    )


def test_from_bytes_reads_manifest_written_by_hand():
    assert manifest.from_bytes(sealed(parsed_golden()), "golden") == sample()


@settings(max_examples=50, deadline=None)
@given(
    numbers=st.lists(st.integers(0, (1 << 63) - 1), min_size=6, max_size=6),
    objects=st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False)),
    names=st.lists(st.text(), unique=True, max_size=4),
)
def test_round_trip_preserves_numbers_names_and_values(numbers, objects, names):
    keys = ("step", "epoch", "samples", "attempt", "save", "world_size")
    entry = TensorEntry(dtype="F32", shape=(2,), file=0)
    original = replace(
        sample(),
        **dict(zip(keys, numbers, strict=True)),
        objects=objects,
        tensors=dict.fromkeys(names, entry),
    )
    assert manifest.from_bytes(manifest.to_bytes(original), "x") == original


def test_round_trip_preserves_surrogate_escapes():
    name = b"/data/\xff".decode("utf-8", "surrogateescape")  # a path, as Python gives it
    original = replace(sample(), config={"data": {"dir": name}})
    assert manifest.from_bytes(manifest.to_bytes(original), "x") == original


@given(step=st.integers(0, 10**12), attempt=st.integers(1, 10**6))
@settings(max_examples=50, deadline=None)
def test_parse_folder_inverts_folder_name(step, attempt):
    assert manifest.parse_folder(manifest.folder_name(step, attempt)) == (step, attempt)


@pytest.mark.parametrize(
    "name",
    ["", "step-1.1", "step-00000001", "step-00000001.0001x", "step-00000001.0001\n",
     "../step-00000001.0001", "step--0000001.0001"],
)  # fmt: skip
def test_other_folder_names_are_not_checkpoints(name):
    assert manifest.parse_folder(name) is None


# --- damage --------------------------------------------------------------------------------------


def test_from_bytes_rejects_every_flipped_bit():
    data = GOLDEN.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            altered = bytearray(data)
            altered[position] ^= 1 << bit
            rejection(bytes(altered))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_from_bytes_rejects_every_replaced_byte(data):
    golden = GOLDEN.read_bytes()
    position = data.draw(st.integers(0, len(golden) - 1) | st.integers(len(golden) - 40, 99999))
    position = min(position, len(golden) - 1)
    altered = bytearray(golden)
    altered[position] ^= data.draw(st.integers(1, 255))
    rejection(bytes(altered))


def test_from_bytes_rejects_every_truncation():
    data = GOLDEN.read_bytes()
    for length in range(len(data)):
        rejection(data[:length])


@pytest.mark.parametrize("extra", [b"\n", b" ", b"\0", b"{}", GOLDEN.read_bytes()])
def test_from_bytes_rejects_extra_bytes(extra):
    rejection(GOLDEN.read_bytes() + extra)
    rejection(extra + GOLDEN.read_bytes())


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_from_bytes_rejects_arbitrary_bytes(data):
    rejection(data)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_from_bytes_rejects_other_encodings(encoding):
    rejection(GOLDEN.read_text("utf-8").encode(encoding))


def test_from_bytes_rejects_void_manifest():
    for data in (manifest.void_bytes(7), manifest.void_bytes(7) + b"\n"):
        assert manifest.is_void(data)
        assert "abandoned" in str(rejection(data))


@pytest.mark.parametrize("data", [b"", b"{}", b'{"void":-1}', b'{"void":1,"a":2}', b'{"void":""}'])
def test_other_small_objects_are_not_void(data):
    assert not manifest.is_void(data)
    rejection(data)


def test_from_bytes_rejects_oversized_manifest():
    data = memoryview(bytes(manifest.MAX_MANIFEST_BYTES + 1))
    assert "exceed the maximum" in str(rejection(data))


@pytest.mark.parametrize("brackets", [b"[", b'{"a":', b'[{"a":'])
def test_from_bytes_rejects_deep_nesting(brackets):
    rejection(brackets * 100_000)


# --- division of tensors -------------------------------------------------------------------------


def all_boxes(entry, files):
    return list(entry.boxes(files, Box.full(entry.shape)))


SHAPES_AND_GRIDS = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 4)), max_size=4)


@settings(max_examples=200, deadline=None)
@given(SHAPES_AND_GRIDS, st.data())
def test_grid_covers_each_element_once_and_boxes_selects_overlapping_cells(pairs, data):
    shape, grid = tuple(n for n, _ in pairs), tuple(g for _, g in pairs)
    entry = TensorEntry(dtype="F32", shape=shape, grid=grid)
    owner = np.full(shape, -1)
    for number in range(math.prod(grid)):
        cell = entry.cell(number)
        index = tuple(slice(o, o + n) for o, n in zip(cell.offsets, cell.lengths, strict=True))
        assert owner[index].shape == cell.lengths
        assert (owner[index] == -1).all()
        owner[index] = number
    assert (owner >= 0).all()
    begin = [data.draw(st.integers(0, n)) for n in shape]
    end = [data.draw(st.integers(b, n)) for b, n in zip(begin, shape, strict=True)]
    owners = owner[tuple(slice(b, e) for b, e in zip(begin, end, strict=True))]
    box = Box(tuple(begin), tuple(e - b for b, e in zip(begin, end, strict=True)))
    cells = list(entry.boxes([str(i) for i in range(math.prod(grid))], box))
    if owners.size:
        assert [int(file) for file, _ in cells] == sorted(set(owners.flatten().tolist()))
    for file, cell in cells:
        assert cell == entry.cell(int(file))


@settings(max_examples=100, deadline=None)
@given(n=st.integers(0, 50), pieces=st.integers(1, 12))
def test_grid_matches_torch_chunk(n, pieces):
    import torch

    entry = TensorEntry(dtype="F32", shape=(n,), grid=(pieces,))
    lengths = [entry.cell(number).lengths[0] for number in range(pieces)]
    chunks = [len(chunk) for chunk in torch.arange(n).chunk(pieces)] if n else []
    assert lengths == chunks + [0] * (pieces - len(chunks))


def test_grid_cells_are_in_c_order():
    cells = all_boxes(TensorEntry(dtype="F32", shape=(3, 4), grid=(2, 2)), ["a", "b", "c", "d"])
    assert [(file, box.offsets, box.lengths) for file, box in cells] == [
        ("a", (0, 0), (2, 2)),
        ("b", (0, 2), (2, 2)),
        ("c", (2, 0), (1, 2)),
        ("d", (2, 2), (1, 2)),
    ]


def test_boxes_of_unsplit_tensor_and_columns():
    files = list(sample().files)
    weight = sample().tensors["model.weight"]
    assert all_boxes(weight, files) == [(files[2], Box((0, 0), (4, 3)))]
    assert all_boxes(sample().resolve("model.cut"), files) == [
        (files[0], Box((0, 0), (2, 1))),
        (files[3], Box((0, 1), (2, 2))),
    ]


def test_resolve_follows_alias():
    assert sample().resolve("model.tied") == sample().tensors["model.weight"]
