"""Shards are valid safetensors files, as read by safetensors itself."""

import math
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
from support.saved_tensors import from_bits, ones, raw_bytes
from support.shard_files import SAMPLE, write_tensors

from trainer.checkpoint import shard
from trainer.checkpoint.dtypes import DTYPES, stored_as
from trainer.checkpoint.plan import DTYPE_NAMES, TORCH_DTYPES
from trainer.checkpoint.shard import Layout
from trainer.checkpoint.shard_writer import LiveTensors, write_shard
from trainer.checkpoint.snapshot import Snapshot
from trainer.storage import LocalStore

GOLDEN = Path(__file__).parents[2] / "golden" / "shard.safetensors"
MIB = 1 << 20


def digest(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


# --- the format ----------------------------------------------------------------------------------

NAMES = {"f": "F", "i": "I", "u": "U", "b": "BOOL", "c": "C"}


def sample_bytes() -> bytes:
    """Write SAMPLE with nothing but the pure functions of the format."""

    def dtype_of(array: np.ndarray) -> str:
        name = NAMES[array.dtype.kind]
        return name if name == "BOOL" else f"{name}{8 * array.itemsize}"

    layout = shard.lay_out((key, dtype_of(array), array.shape) for key, array in SAMPLE.items())
    padding = {shard.PADDING: np.zeros(-data_bytes(SAMPLE) % 8, "u1")}
    parts = [{**SAMPLE, **padding}[chunk.key].tobytes() for chunk in layout.chunks]
    checksums = np.array([digest(part) for part in parts if part], "<u8")
    return layout.header + b"".join(parts) + checksums.tobytes()


def data_bytes(arrays: dict[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())


def test_shard_bytes_match_golden_file():
    assert sample_bytes() == GOLDEN.read_bytes()


def test_golden_shard_is_read_by_safetensors():
    loaded = safetensors.numpy.load(GOLDEN.read_bytes())
    assert set(loaded) == {*SAMPLE, shard.PADDING, shard.CHECKSUMS}
    for key, expected in SAMPLE.items():
        is_complex = expected.dtype.kind == "c"
        stored = expected.view("<f8").reshape(*expected.shape, 2) if is_complex else expected
        assert loaded[key].dtype == stored.dtype
        assert np.array_equal(loaded[key], stored)
    ordered = sorted(SAMPLE.items(), key=lambda item: (-item[1].itemsize, item[0]))
    parts = [array.tobytes() for _, array in ordered if array.size] + [
        loaded[shard.PADDING].tobytes()
    ]
    assert loaded[shard.CHECKSUMS].tolist() == [digest(part) for part in parts]


def test_tensors_lie_by_falling_item_size_then_name():
    keys = [chunk.key for chunk in shard.lay_out([
        ("b", "U8", (1,)), ("a", "F32", (1,)), ("z", "F64", (1,)), ("d", "BF16", (3,)),
        ("a2", "C128", (1,)), ("c", "I32", (1,)), ("e", "BOOL", (1,)),
    ]).chunks]  # fmt: skip
    assert keys == ["a2", "z", "a", "c", "d", "b", "e"]  # of 48 bytes: no padding


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


@st.composite
def tensors_of(draw: st.DrawFn, dtype: torch.dtype) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    data = draw(st.randoms()).randbytes(math.prod(shape) * dtype.itemsize)
    return from_bits(bytes(n % 2 for n in data) if dtype == torch.bool else data, dtype, shape)


PRINTABLE = [dtype for name, dtype in TORCH_DTYPES.items() if stored_as(name, ())[0] == name]
"""Dtypes of safetensors, all of which have a repr for hypothesis."""
FILES = st.dictionaries(
    st.text(max_size=6).filter(lambda name: name not in shard.RESERVED),
    st.sampled_from(PRINTABLE).flatmap(tensors_of),
    max_size=6,
)


def check_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Assert that safetensors, and a few lines of NumPy, read everything from a shard."""
    layout, data, record = written(tensors)
    stored = {key: tensor for key, tensor in tensors.items() if tensor.numel()}
    path.write_bytes(data)
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) - {shard.PADDING} == {*stored, shard.CHECKSUMS}
        assert file.metadata() == {"algorithm": "xxh3_64", "block_bytes": "1048576"}
        for key, tensor in stored.items():
            loaded = file.get_tensor(key)
            dtype, shape = stored_as(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            assert (loaded.dtype, loaded.shape) == (TORCH_DTYPES[dtype], shape)
            assert raw_bytes(loaded) == raw_bytes(tensor)
        checksums = file.get_tensor(shard.CHECKSUMS).tolist()
    assert layout.header_bytes == record.header_bytes == int.from_bytes(data[:8], "little") + 8
    assert layout.header_bytes % 4096 == 0
    assert layout.total_bytes == record.bytes == len(data)
    assert layout.checksums_start % 8 == 0
    assert [digest(data[first:last]) for first, last in layout.blocks()] == checksums
    assert int(record.header_checksum, 16) == digest(data[: record.header_bytes])
    assert int(record.checksums_checksum, 16) == digest(data[layout.checksums_start :])
    covered = [(0, layout.header_bytes), *layout.blocks(), (layout.checksums_start, len(data))]
    assert [first for first, _ in covered[1:]] == [last for _, last in covered[:-1]]


@settings(max_examples=100, deadline=None)
@given(FILES)
@example({})
@example({"a@0": torch.ones(1), "a": torch.ones(1), "ü\n\"'": torch.ones(1)})
def test_safetensors_reads_equal_tensors(tmp_path_factory, tensors):
    check_file(tmp_path_factory.mktemp("shard", numbered=True) / "x.safetensors", tensors)


@pytest.mark.parametrize("shape", [(), (2, 3), (0, 3)])
def test_safetensors_reads_every_dtype(tmp_path, shape):
    tensors = {name: ones(shape, dtype) for name, dtype in TORCH_DTYPES.items()}
    check_file(tmp_path / "x.safetensors", tensors)


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
    layout, data, _ = written({"a": first, "b": second})
    expected = [
        digest(raw[start : start + MIB])
        for raw in (raw_bytes(first), raw_bytes(second), bytes(-(size + MIB + 7) % 8))
        for start in range(0, len(raw), MIB)
    ]
    assert np.frombuffer(data[layout.checksums_start :], "<u8").tolist() == expected


@pytest.mark.parametrize("part_bytes", [4096, 5000, 1 << 20, 4 << 20, 1 << 30])
@pytest.mark.parametrize("source", ["snapshot", "live"])
def test_bytes_do_not_depend_on_part_size_or_source(tmp_path, part_bytes, source):
    tensors = {"a": torch.randn(700_000), "b": torch.arange(MIB + 7) % 251 > 5, "c": torch.ones(3)}
    store = LocalStore(tmp_path)
    store.part_bytes = part_bytes
    if source == "snapshot":
        write_tensors(store, "shard", tensors)
    else:
        layout, _, _ = written(tensors)
        write_shard(store, "shard", layout, LiveTensors(layout, tensors.__getitem__))
    assert store.read("shard") == written(tensors)[1]


def test_layout_does_not_need_the_header():
    layout, _, record = written({"a": torch.ones(5), "b": torch.ones(3, dtype=torch.uint8)})
    triples = [("b", "U8", (3,)), ("a", "F32", (5,))]
    assert shard.lay_out(triples, header_bytes=record.header_bytes) == layout


def test_reused_buffer_keeps_no_bytes_of_previous_save():
    snapshot = Snapshot()
    files = [{"a": torch.full((n,), float(n))} for n in (9000, 10, 5000)]
    for tensors in files:
        assert written(tensors, snapshot)[1:] == written(tensors)[1:]


def test_dtypes_match_item_sizes_of_torch():
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == dict(DTYPES)
