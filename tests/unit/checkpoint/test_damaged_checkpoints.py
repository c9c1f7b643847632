"""Damaged or inconsistent shards are detected and named."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from support.saved_tensors import (
    MIB,
    SMALL,
    VALUES,
    assert_equal,
    load_all,
    save,
    writer_on,
)
from support.shard_files import write_tensors
from torch import Tensor

from trainer import checkpoint
from trainer.checkpoint import lineage, manifest, shard
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.shard_reader import DamagedError
from trainer.errors import CheckpointError
from trainer.storage import LocalStore, Store


class Stored:
    """A run with two checkpoints of equal size, which tests damage and repair."""

    def __init__(self, root: Path) -> None:
        self.store = LocalStore(root)
        writer = writer_on(self.store)
        self.older = save(writer, {name: value + 1 for name, value in VALUES.items()}, 1)
        self.manifest = save(writer, VALUES, 2)
        (self.name,) = self.manifest.files
        self.path = root / "checkpoints" / self.manifest.folder / self.name
        self.older_path = root / "checkpoints" / self.older.folder / next(iter(self.older.files))

    def assert_intact(self) -> None:
        assert_equal(load_all(self.store, VALUES), VALUES)
        assert_equal(load_all(self.store, VALUES, peers=2), VALUES)
        checkpoint.verify(self.store, self.manifest)

    def assert_detected(self, *about: str) -> None:
        """Assert that `load` and `verify` raise an error with the file and `about`."""
        for find in (
            lambda: load_all(self.store, VALUES),
            lambda: load_all(self.store, VALUES, peers=2),
            self.verify,
        ):
            with pytest.raises(DamagedError) as caught:
                find()
            for text in (self.name, "step 2", *about):
                assert text in str(caught.value)

    def assert_detected_by_verify(self, about: str) -> None:
        """Assert that `verify` raises, and that loading, which reads other bytes, is right."""
        with pytest.raises(DamagedError, match=about):
            self.verify()
        assert_equal(load_all(self.store, VALUES), VALUES)

    def verify(self) -> None:
        checkpoint.verify(self.store, self.manifest)

    def flip(self, position: int, bit: int = 0) -> None:
        with open(self.path, "r+b") as file:
            file.seek(position)
            (value,) = file.read(1)
            file.seek(position)
            file.write(bytes([value ^ (1 << bit)]))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    run = Stored(tmp_path_factory.mktemp("damage"))
    run.assert_intact()
    yield run
    run.assert_intact()  # every test has repaired its damage


def positions(stored: Stored) -> dict[str, tuple[int, str]]:
    """Return byte positions in every part of a shard, each with the expected error text."""
    record = stored.manifest.files[stored.name]
    data = stored.path.read_bytes()
    layout = shard.lay_out(manifest.pieces(stored.manifest, 0))
    end_of_json = len(data[: record.header_bytes].rstrip(b" "))
    cases = {
        f"header {label}": (position, "header")
        for label, position in {
            "length": 0, "length, high byte": 7, "first brace": 8, "middle": end_of_json // 2,
            "last brace": end_of_json - 1, "padding": end_of_json, "end": record.header_bytes - 1,
        }.items()
    }  # fmt: skip
    for label, position in {
        "first": layout.checksums_start, "last": record.bytes - 1,
    }.items():  # fmt: skip
        cases[f"checksums, {label} byte"] = (position, "its checksums")
    for chunk in layout.chunks:
        for number, start in enumerate(range(chunk.start, chunk.stop, MIB)):
            stop = min(start + MIB, chunk.stop)
            about = f"'{chunk.key}': bytes {start - chunk.start:,} to {stop - chunk.start:,}"
            for label, position in {
                "first": start,
                "middle": (start + stop) // 2,
                "last": stop - 1,
            }.items():
                cases[f"{chunk.key}, block {number}, {label} byte"] = (position, about)
    return cases


def test_flipped_bit_in_any_block_or_header_part_is_detected(stored):
    targets = positions(stored)
    assert len(targets) == 7 + 2 + 3 * (6 + 1 + 1 + 2 + 1)
    for bit, (position, about) in enumerate(targets.values()):
        stored.flip(position, bit % 8)
        if about == "header" or "__padding__" in about:
            stored.assert_detected_by_verify(about)
        else:
            stored.assert_detected(about)
        stored.flip(position, bit % 8)


@settings(max_examples=25, deadline=None)
@given(fraction=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_flipped_bit_anywhere_is_detected(stored, fraction, bit):
    position = int(fraction * stored.path.stat().st_size)
    stored.flip(position, bit)
    with pytest.raises(DamagedError, match=stored.name):
        stored.verify()
    stored.flip(position, bit)


@pytest.mark.parametrize("change", [-1, +1, -4096])
def test_changed_file_length_is_detected(stored, change):
    data = stored.path.read_bytes()
    stored.path.write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    stored.assert_detected("bytes but its manifest records")
    stored.path.write_bytes(data)


def test_empty_file_is_detected(stored):
    data = stored.path.read_bytes()
    stored.path.write_bytes(b"")
    stored.assert_detected("0 bytes")
    stored.path.write_bytes(data)


def test_missing_file_is_detected(stored):
    moved = stored.path.with_suffix(".away")
    stored.path.rename(moved)
    stored.assert_detected("missing")
    moved.rename(stored.path)


def test_file_replaced_by_shard_of_equal_size_is_detected(stored):
    moved = stored.path.with_suffix(".away")
    assert stored.path.stat().st_size == stored.older_path.stat().st_size
    stored.path.rename(moved)
    shutil.copy(stored.older_path, stored.path)
    stored.assert_detected("checksums")
    moved.rename(stored.path)


def test_header_with_data_of_another_save_is_detected(stored):
    data, other = stored.path.read_bytes(), stored.older_path.read_bytes()
    length = stored.manifest.files[stored.name].header_bytes
    stored.path.write_bytes(data[:length] + other[length:])
    stored.assert_detected("checksum mismatch")
    stored.path.write_bytes(data)


def test_swapped_blocks_are_detected(stored):
    data = stored.path.read_bytes()
    start = positions(stored)["a, block 0, first byte"][0]
    one, two = data[start : start + MIB], data[start + MIB : start + 2 * MIB]
    stored.path.write_bytes(data[:start] + two + one + data[start + 2 * MIB :])
    stored.assert_detected("'a': bytes 0 to")
    stored.path.write_bytes(data)


def test_latest_rejects_manifest_in_folder_of_another_step(tmp_path):
    store = LocalStore(tmp_path)
    committed = save(writer_on(store), SMALL, 1)
    os.rename(
        tmp_path / "checkpoints" / committed.folder, tmp_path / "checkpoints/step-00000002.0001"
    )
    with pytest.raises(CheckpointError, match="manifest of step 1, attempt 1"):
        checkpoint.latest(store)


class CorruptOnce(LocalStore):
    """A store whose first read of each range returns a flipped bit."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._seen: set[tuple[str, int]] = set()

    def read_into(self, key: str, start: int, buffer: memoryview, **how: Any) -> int:
        count = super().read_into(key, start, buffer, **how)
        if (key, start) not in self._seen:
            self._seen.add((key, start))
            buffer[-1] ^= 1
        return count


def test_checksum_mismatch_is_read_again_before_error(stored):
    assert_equal(load_all(CorruptOnce(stored.store.url), VALUES), VALUES)
    checkpoint.verify(CorruptOnce(stored.store.url), stored.manifest)


def in_parts(store: Store) -> tuple[manifest.Manifest, dict[str, Tensor]]:
    """Commit a checkpoint as several ranks would: a grid and columns over three files."""
    values = {
        "grid": torch.arange(35.0).reshape(5, 7),
        "columns": torch.randn(4, 6, dtype=torch.complex128),
        "whole": torch.arange(9).to(torch.int16),
    }
    files = [
        {
            "grid@0,0": values["grid"][:2],
            "columns@0,0": values["columns"][:, :2],
            "whole": values["whole"],
        },
        {"grid@2,0": values["grid"][2:4], "columns@0,2": values["columns"][:3, 2:]},
        {"grid@4,0": values["grid"][4:], "columns@3,2": values["columns"][3:, 2:]},
    ]
    attempt = lineage.begin(store, {})
    folder, records = f"checkpoints/{manifest.folder_name(1, attempt.number)}", {}
    for rank, parts in enumerate(files):
        name = manifest.shard_name(rank=rank, world_size=3, token=attempt.token, save=1)
        _, records[name] = write_tensors(store, f"{folder}/{name}", parts)
    committed = manifest.Manifest(
        step=1, epoch=0, samples=0, attempt=attempt.number, token=attempt.token, save=1,
        world_size=3, versions={}, files=records, objects={},
        tensors={
            "grid": manifest.TensorEntry(dtype="F32", shape=(5, 7), grid=(3, 1)),
            "columns": manifest.TensorEntry(dtype="C128", shape=(4, 6), columns={
                "file": [0, 1, 2],
                "offsets": [[0, 0], [0, 2], [3, 2]],
                "lengths": [[4, 2], [3, 4], [1, 4]],
            }),
            "whole": manifest.TensorEntry(dtype="I16", shape=(9,), file=0),
            "tied": manifest.TensorEntry(alias="grid"),
        },
    )  # fmt: skip
    store.create(f"{folder}/manifest.json", manifest.to_bytes(committed))
    return committed, {**values, "tied": values["grid"]}


def test_tensors_split_over_files_are_assembled(tmp_path):
    store = LocalStore(tmp_path)
    committed, values = in_parts(store)
    assert checkpoint.latest(store) == committed
    assert_equal(load_all(store, values), values)
    checkpoint.verify(store, committed)


def test_swapped_files_are_detected(tmp_path):
    store = LocalStore(tmp_path)
    committed, _ = in_parts(store)
    one, two = (
        tmp_path / "checkpoints" / committed.folder / name for name in list(committed.files)[:2]
    )
    size = max(one.stat().st_size, two.stat().st_size)
    one.rename(one.with_suffix(".away"))
    two.rename(one)
    one.with_suffix(".away").rename(two)
    for path in (one, two):
        os.truncate(path, size)
    with pytest.raises(DamagedError, match=f"{one.name}|{two.name}"):
        checkpoint.verify(store, committed)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("whole", {"dtype": "BF16", "shape": [9], "file": 0}),
        ("whole", {"dtype": "I16", "shape": [3, 3], "file": 0}),
        ("whole", {"dtype": "I16", "shape": [9], "file": 1}),
        ("grid", {"dtype": "I32", "shape": [5, 7], "grid": [3, 1]}),
        ("grid", {"dtype": "F32", "shape": [5, 7], "grid": [1, 3]}),
        ("columns", {"dtype": "F64", "shape": [4, 6, 2], "file": 0}),
    ],
)
def test_verify_rejects_manifest_that_contradicts_headers(tmp_path, name, entry):
    import json

    store = LocalStore(tmp_path)
    committed, _ = in_parts(store)
    path = tmp_path / "checkpoints" / committed.folder / "manifest.json"
    top = json.loads(path.read_bytes())
    del top["checksum"]
    top["tensors"][name] = entry
    body = json.dumps(top)[:-1].encode()
    tail = b',\n"checksum":"%s"\n}\n' % xxhash.xxh3_64_hexdigest(body).encode()
    path.write_bytes(body + tail)
    hostile = checkpoint.latest(store)
    with pytest.raises(CheckpointError, match=r"its header describes other|tensors of .* need"):
        Reader(store, f"checkpoints/{committed.folder}", hostile).verify()
