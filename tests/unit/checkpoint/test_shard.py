"""Shards are valid safetensors files, as read by safetensors itself."""

import json
import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.shard_files import write_tensors

from trainer.checkpoint import shard
from trainer.checkpoint.plan import DTYPE_NAMES, TORCH_DTYPES
from trainer.checkpoint.shard import Layout
from trainer.checkpoint.snapshot import Snapshot
from trainer.errors import CheckpointError
from trainer.storage import LocalStore

GOLDEN = Path(__file__).parents[2] / "golden" / "shard.safetensors"
MIB = 1 << 20


def digest(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)


# --- the format ----------------------------------------------------------------------------------

SAMPLE = {
    "model.weight": np.arange(6, dtype="<f4").reshape(2, 3),
    "model.bias": np.array([-1.5, 2.5], dtype="<f4"),
    "moment@0,2": np.array([[1], [-2]], dtype="<i8"),
    "flags": np.array([True, False, True]),
    "rng.0.torch": np.arange(5, dtype="u1"),
    "step": np.array(7, dtype="<f4"),
    "nothing": np.zeros((0, 4), dtype="<f8"),
    "naïve": np.array([1 + 2j], dtype="<c16"),
}
NAMES = {"f": "F", "i": "I", "u": "U", "b": "BOOL", "c": "C"}


def sample_bytes() -> bytes:
    """Write SAMPLE with nothing but the pure functions of the format."""

    def dtype_of(array: np.ndarray) -> str:
        name = NAMES[array.dtype.kind]
        return name if name == "BOOL" else f"{name}{8 * array.itemsize}"

    layout = shard.lay_out((key, dtype_of(array), array.shape) for key, array in SAMPLE.items())
    parts = [SAMPLE[chunk.key].tobytes() for chunk in layout.chunks]
    return shard.header(layout, [digest(part) for part in parts if part]) + b"".join(parts)


def test_shard_bytes_match_golden_file():
    assert sample_bytes() == GOLDEN.read_bytes()


def test_golden_shard_is_read_by_safetensors_and_parse_header():
    data = GOLDEN.read_bytes()
    loaded = safetensors.numpy.load(data)
    chunks, digests = shard.parse_header(data[:4096], total_bytes=len(data), where="golden")
    assert set(loaded) == set(chunks) == set(SAMPLE)
    for key, expected in SAMPLE.items():
        is_complex = expected.dtype.kind == "c"
        stored = expected.view("<f8").reshape(*expected.shape, 2) if is_complex else expected
        assert loaded[key].dtype == stored.dtype
        assert chunks[key].shape == loaded[key].shape == stored.shape
        assert np.array_equal(loaded[key], stored)
        raw = data[chunks[key].start : chunks[key].stop]
        assert raw == expected.tobytes()
        assert not raw or digests[chunks[key].block] == digest(raw)


def test_tensors_lie_by_falling_item_size_then_name():
    keys = [chunk.key for chunk in shard.lay_out([
        ("b", "U8", (1,)), ("a", "F32", (1,)), ("z", "F64", (1,)), ("d", "BF16", (3,)),
        ("a2", "C128", (1,)), ("c", "I32", (1,)), ("e", "BOOL", (1,)),
    ]).chunks]  # fmt: skip
    assert keys == ["a2", "z", "a", "c", "d", "b", "e"]


@given(st.permutations(sorted(SAMPLE)))
@settings(max_examples=10, deadline=None)
def test_lay_out_ignores_input_order(keys):
    triples = {key: (key, "F32", SAMPLE[key].shape) for key in SAMPLE}
    assert shard.lay_out(triples[key] for key in keys) == shard.lay_out(triples.values())


def test_part_key_contains_offsets():
    assert shard.part_key("w", None) == "w"
    assert shard.part_key("w", (0, 12)) == "w@0,12"
    assert shard.part_key("w", ()) == "w@"


# --- safetensors reads every layout --------------------------------------------------------------


def written(
    tensors: dict[str, torch.Tensor], snapshot: Snapshot | None = None
) -> tuple[Layout, bytes, Any]:
    """Return the layout, the bytes and the record of a shard of these tensors."""
    with TemporaryDirectory() as folder:
        store = LocalStore(folder)
        layout, record = write_tensors(store, "shard", tensors, snapshot)
        return layout, store.read("shard"), record


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@st.composite
def tensors_of(draw: st.DrawFn, dtype: torch.dtype) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = math.prod(shape)
    size = 1 if dtype == torch.bool else count * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        return torch.arange(count).remainder(2 + data[0]).eq(0).reshape(shape)
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


FILES = st.dictionaries(
    st.text(max_size=6).filter(lambda name: name != "__metadata__"),
    st.sampled_from(list(DTYPE_NAMES)).flatmap(tensors_of),
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(FILES)
@example({})
@example({name: torch.ones((), dtype=dtype) for dtype, name in DTYPE_NAMES.items()})
@example({name: torch.ones((2, 3), dtype=dtype) for dtype, name in DTYPE_NAMES.items()})
@example({name: torch.ones((0, 3), dtype=dtype) for dtype, name in DTYPE_NAMES.items()})
@example({"a@0": torch.ones(1), "a": torch.ones(1), "ü\n\"'": torch.ones(1)})
def test_safetensors_reads_equal_tensors(tmp_path_factory, tensors):
    layout, data, record = written(tensors)
    path = tmp_path_factory.mktemp("shard", numbered=True) / "x.safetensors"
    path.write_bytes(data)
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata()["algorithm"] == "xxh3_64"
        for key, tensor in tensors.items():
            loaded = file.get_tensor(key)
            if tensor.dtype == torch.complex128:
                loaded = torch.view_as_complex(loaded)
            assert loaded.dtype == tensor.dtype
            assert loaded.shape == tensor.shape
            assert raw_bytes(loaded) == raw_bytes(tensor)
    assert set(safetensors.torch.load_file(path)) == set(tensors)
    assert layout.header_bytes == record.header_bytes == int.from_bytes(data[:8], "little") + 8
    assert layout.header_bytes % 4096 == 0
    assert layout.total_bytes == record.bytes == len(data)
    assert record.header_checksum == digest(data[: record.header_bytes])


@settings(max_examples=40, deadline=None)
@given(FILES)
def test_safetensors_for_numpy_reads_equal_arrays(tensors):
    supported = {
        key: tensor
        for key, tensor in tensors.items()
        if tensor.dtype != torch.bfloat16 and "float8" not in str(tensor.dtype)
    }
    _, data, _ = written(supported)
    loaded = safetensors.numpy.load(data)
    assert {key: array.tobytes() for key, array in loaded.items()} == {
        key: raw_bytes(tensor) for key, tensor in supported.items()
    }


@settings(max_examples=60, deadline=None)
@given(FILES)
def test_parse_header_inverts_lay_out(tensors):
    layout, data, record = written(tensors)
    chunks, digests = shard.parse_header(
        data[: record.header_bytes], total_bytes=len(data), where="x"
    )
    assert list(chunks) == [chunk.key for chunk in layout.chunks]
    for chunk in layout.chunks:
        loaded = chunks[chunk.key]
        raw = data[loaded.start : loaded.stop]
        assert (loaded.start, loaded.stop, loaded.block) == (chunk.start, chunk.stop, chunk.block)
        assert raw == raw_bytes(tensors[chunk.key])
        assert digests[loaded.block : loaded.block + 1] == [digest(raw)] or not raw
    assert len(digests) == sum(1 for tensor in tensors.values() if tensor.numel())


def test_data_starts_at_multiple_of_4096():
    for count in range(0, 120, 3):
        _, data, record = written({f"tensor{i}": torch.ones(1) for i in range(count)})
        end_of_json = data[: record.header_bytes].rstrip(b" ")
        assert record.header_bytes % 4096 == 0
        assert record.header_bytes - len(end_of_json) < 4096
        assert end_of_json.endswith(b"}")


@pytest.mark.parametrize("size", [1, MIB - 1, MIB, MIB + 1, 3 * MIB, 3 * MIB + 5])
def test_blocks_have_at_most_1_mib_and_start_anew_at_every_tensor(size):
    first = torch.arange(size).to(torch.uint8)
    second = torch.arange(MIB + 7).to(torch.uint8) + 1
    _, data, record = written({"a": first, "b": second})
    chunks, digests = shard.parse_header(
        data[: record.header_bytes], total_bytes=len(data), where="x"
    )
    expected = [
        digest(raw[start : start + MIB])
        for raw in (raw_bytes(first), raw_bytes(second))
        for start in range(0, len(raw), MIB)
    ]
    assert digests == expected
    assert chunks["b"].block == len(expected) - 2


def test_reused_buffer_keeps_no_bytes_of_previous_save():
    snapshot = Snapshot()
    files = [{"a": torch.full((n,), float(n))} for n in (9000, 10, 5000)]
    for tensors in files:
        assert written(tensors, snapshot)[1:] == written(tensors)[1:]


def test_dtypes_match_item_sizes_of_torch():
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == dict(shard.DTYPES)


# --- hostile headers -----------------------------------------------------------------------------


def hostile(content: Any, *, length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def rejection(header: bytes, data_bytes: int) -> str:
    with pytest.raises(CheckpointError) as caught:
        shard.parse_header(header, total_bytes=len(header) + data_bytes, where="here/x")
    assert str(caught.value).startswith("here/x: not a checkpoint shard: ")
    return str(caught.value)


def good() -> dict[str, Any]:
    return {
        "__metadata__": {"algorithm": "xxh3_64", "blocks": "0123456789abcdef" * 2},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "U8", "shape": [8], "data_offsets": [24, 32]},
    }


def test_parse_header_accepts_valid_header():
    chunks, digests = shard.parse_header(
        hostile(good()), total_bytes=len(hostile(good())) + 32, where="x"
    )
    assert list(chunks) == ["a", "b"]
    assert digests == ["0123456789abcdef"] * 2


def tensor(dtype: Any = "U8", shape: Any = (8,), offsets: Any = (24, 32)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def metadata(blocks: Any) -> dict[str, Any]:
    return {"algorithm": "xxh3_64", "blocks": blocks}


HOSTILE: dict[str, dict[str, Any]] = {
    "overlap": {"b": tensor(offsets=(16, 24))},
    "hole": {"b": tensor(offsets=(25, 33))},
    "overlap that ends in the right place": {"b": tensor(shape=(16,), offsets=(16, 32))},
    "hole that ends in the right place": {"b": tensor(shape=(4,), offsets=(28, 32))},
    "data after the end": {"b": tensor(shape=(7,), offsets=(24, 31))},
    "beyond the end": {"b": tensor(shape=(9,), offsets=(24, 33))},
    "empty beyond the end": {"c": tensor(shape=(0,), offsets=(33, 33))},
    "backwards": {"b": tensor(offsets=(32, 24))},
    "negative offsets": {"b": tensor(offsets=(-8, 0))},
    "huge offsets": {"b": tensor(shape=(1 << 62,), offsets=(24, 24 + (1 << 62)))},
    "infinite offsets": {"b": tensor(offsets=(24, 1e999))},
    "no number offsets": {"b": tensor(offsets=("24", None))},
    "one offset": {"b": tensor(offsets=(24,))},
    "three offsets": {"b": tensor(offsets=(24, 32, 40))},
    "shape of other size": {"b": tensor(shape=(4,))},
    "negative shape": {"b": tensor(shape=(-2, -4))},
    "shape of zero and more": {"b": tensor(shape=(0, 8))},
    "fractional shape": {"b": tensor(shape=(8.5,))},
    "infinite shape": {"b": tensor(shape=(1e999,))},
    "shape a number": {"b": tensor(shape=8)},
    "shape null": {"b": tensor(shape=None)},
    "unknown dtype": {"b": tensor(dtype="F4")},
    "dtype null": {"b": tensor(dtype=None)},
    "dtype a list": {"b": tensor(dtype=["U8"])},
    "entry null": {"b": None},
    "entry a list": {"b": [8]},
    "entry without a dtype": {"b": {"shape": [8], "data_offsets": [24, 32]}},
    "no metadata": {"__metadata__": None},
    "no blocks": {"__metadata__": {"algorithm": "xxh3_64"}},
    "too few blocks": {"__metadata__": metadata("0123456789abcdef")},
    "too many blocks": {"__metadata__": metadata("0123456789abcdef" * 3)},
    "half a block": {"__metadata__": metadata("0123456789abcdef0123456789abcde")},
    "blocks a list": {"__metadata__": metadata(["0"] * 32)},
    "blocks null": {"__metadata__": metadata(None)},
    "blocks a number": {"__metadata__": metadata(5)},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_parse_header_rejects_inconsistent_header(change):
    rejection(hostile({**good(), **change}), 32)


def test_parse_header_rejects_missing_metadata():
    content = good()
    del content["__metadata__"]
    rejection(hostile(content), 32)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 63) - 1, (1 << 64) - 1])
def test_parse_header_rejects_wrong_length(length):
    assert "length" in rejection(hostile(good(), length=length), 32)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b'"x"', b"5", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000],
)
def test_parse_header_rejects_non_object(content):
    rejection(hostile(content), 0)


@pytest.mark.parametrize("length", range(9))
def test_parse_header_rejects_truncated_header(length):
    rejection(hostile(good())[:length], 32)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.sampled_from(["", "F32", "C128", "0123456789abcdef"]),
    lambda children: st.lists(children, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["a", "b", "c", "__metadata__"]),
    st.sampled_from(["dtype", "shape", "data_offsets", "blocks", None]),
    JSON_VALUES,
)
def test_parse_header_rejects_any_edit_that_does_not_tile_file(name, key, value):
    content = good()
    content[name] = value if key is None else {**content.get(name, {}), key: value}
    header = hostile(content)
    try:
        chunks, digests = shard.parse_header(header, total_bytes=len(header) + 32, where="x")
    except CheckpointError:
        return
    position = len(header)
    for chunk in chunks.values():
        assert chunk.start == position
        assert chunk.nbytes == math.prod(chunk.shape) * shard.DTYPES[chunk.dtype]
        assert all(n >= 0 for n in chunk.shape)
        position = chunk.stop
    assert position == len(header) + 32
    assert all(re.fullmatch(".{16}", item) for item in digests)
