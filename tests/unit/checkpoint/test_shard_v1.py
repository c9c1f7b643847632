"""Headers of version 1: read exactly, and rejected if they do not tile the file."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shard_files import SAMPLE

from trainer.checkpoint import shard_v1
from trainer.checkpoint.dtypes import DTYPES
from trainer.errors import CheckpointError

GOLDEN = Path(__file__).parents[2] / "golden" / "shard-v1.safetensors"


def parse(data: bytes, total_bytes: int, where: str = "x") -> Any:
    return shard_v1.parse_header(data, total_bytes=total_bytes, where=where, block_bytes=1 << 20)


def test_golden_shard_is_parsed():
    data = GOLDEN.read_bytes()
    loaded = safetensors.numpy.load(data)
    chunks, digests = parse(data[:4096], len(data))
    assert set(loaded) == set(chunks) == set(SAMPLE)
    for key, expected in SAMPLE.items():
        is_complex = expected.dtype.kind == "c"
        stored = expected.view("<f8").reshape(*expected.shape, 2) if is_complex else expected
        assert loaded[key].dtype == stored.dtype
        assert chunks[key].shape == loaded[key].shape == stored.shape
        assert np.array_equal(loaded[key], stored)
        raw = data[chunks[key].start : chunks[key].stop]
        assert raw == expected.tobytes()
        assert not raw or digests[chunks[key].block] == xxhash.xxh3_64_intdigest(raw)


# --- hostile headers -----------------------------------------------------------------------------


def hostile(content: Any, *, length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def rejection(header: bytes, data_bytes: int) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse(header, len(header) + data_bytes, "here/x")
    assert str(caught.value).startswith("here/x: not a checkpoint shard: ")
    return str(caught.value)


def good() -> dict[str, Any]:
    return {
        "__metadata__": {"algorithm": "xxh3_64", "blocks": "0123456789abcdef" * 2},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "U8", "shape": [8], "data_offsets": [24, 32]},
    }


def test_parse_header_accepts_valid_header():
    chunks, digests = parse(hostile(good()), len(hostile(good())) + 32)
    assert list(chunks) == ["a", "b"]
    assert digests == [0x0123456789ABCDEF] * 2


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
    "unknown dtype": {"b": tensor(dtype="F5")},
    "dtype null": {"b": tensor(dtype=None)},
    "dtype a list": {"b": tensor(dtype=["U8"])},
    "entry null": {"b": None},
    "entry a list": {"b": [8]},
    "entry without a dtype": {"b": {"shape": [8], "data_offsets": [24, 32]}},
    "no metadata": {"__metadata__": None},
    "no blocks": {"__metadata__": {"algorithm": "xxh3_64"}},
    "too few blocks": {"__metadata__": metadata("0123456789abcdef")},
    "too many blocks": {"__metadata__": metadata("0123456789abcdef" * 3)},
    "digits that are none": {"__metadata__": metadata("0123456789abcdex" * 2)},
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
        chunks, digests = parse(header, len(header) + 32)
    except CheckpointError:
        return
    position = len(header)
    for chunk in chunks.values():
        assert chunk.start == position
        assert chunk.nbytes == math.prod(chunk.shape) * DTYPES[chunk.dtype]
        assert all(n >= 0 for n in chunk.shape)
        position = chunk.stop
    assert position == len(header) + 32
    assert all(0 <= digest < 1 << 64 for digest in digests)
