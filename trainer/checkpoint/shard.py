"""Shard layout: a safetensors file with a checksum for every block. Pure: no I/O, no torch.

The layout is that of safetensors (eight bytes of header length, a JSON header, the tensors without
holes), restricted so that it follows from the keys, dtypes and shapes alone: tensors are ordered by
decreasing item size, then by key, and the header is padded with spaces to a multiple of 4096
bytes. The last tensor, `__checksums__`, holds the checksums of the others in file order, one for
each block of at most 1 MiB. Every tensor starts a new block. All bytes are known in file order, so
a shard is written from its first byte to its last.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import xxhash

from trainer.checkpoint.dtypes import DTYPES, stored_as

ALIGNMENT_BYTES = 4096
BLOCK_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors' own readers
METADATA = "__metadata__"
CHECKSUMS = "__checksums__"
PADDING = "__padding__"
"""Zero bytes before the checksums, so that these start at a multiple of eight."""
RESERVED = frozenset({METADATA, CHECKSUMS, PADDING})
"""Keys that no tensor of the state may have."""
DIGEST_BYTES = 8


def digest(data: bytes | bytearray | memoryview) -> int:
    """Return the XXH3 64-bit checksum (seed 0) of a block."""
    return xxhash.xxh3_64_intdigest(data)


def is_key(name: str) -> bool:
    """Return whether a tensor may have this name: not reserved, and valid Unicode."""
    return name not in RESERVED and name == name.encode("utf-8", "replace").decode()


def element_count(shape: Iterable[int]) -> int:
    """Return the number of elements of a shape."""
    return math.prod(shape)


def part_key(name: str, offsets: Sequence[int] | None) -> str:
    """Return a tensor's key in a shard: its name, or `name@o0,o1` for a part of it."""
    return name if offsets is None else f"{name}@{','.join(map(str, offsets))}"


@dataclass(frozen=True)
class Chunk:
    """A tensor, or a part of one, and its position in a shard."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte, from the start of the file."""
    stop: int
    block: int = 0
    """Index of its first block in the shard's checksums."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """Positions of the header, all chunks and the checksums in a shard."""

    chunks: tuple[Chunk, ...]
    """In file order, with the padding and without the checksums."""
    header_bytes: int
    checksums_start: int
    total_bytes: int
    block_bytes: int

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of every block that has a checksum, in file order."""
        for chunk in self.chunks:
            for start in range(chunk.start, chunk.stop, self.block_bytes):
                yield start, min(start + self.block_bytes, chunk.stop)

    @cached_property
    def header(self) -> bytes:
        """The first `header_bytes` bytes of the file."""
        return _header(self)


def block_count(nbytes: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Return the number of blocks in a chunk of `nbytes`."""
    return -(-nbytes // block_bytes)


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    *,
    block_bytes: int = BLOCK_BYTES,
    header_bytes: int | None = None,
) -> Layout:
    """Return the layout for (key, dtype, shape) triples, independent of their order.

    Args:
        tensors: keys, dtypes and shapes.
        block_bytes: size of a block.
        header_bytes: size of the header, if known; saves computing it.
    """
    ordered = sorted(tensors, key=lambda item: (-DTYPES[item[1]], item[0]))
    data_bytes = sum(element_count(shape) * DTYPES[dtype] for _, dtype, shape in ordered)
    if gap := -data_bytes % DIGEST_BYTES:
        ordered.append((PADDING, "U8", (gap,)))
    spans, position, block = [], 0, 0
    for key, dtype, shape in ordered:
        stop = position + element_count(shape) * DTYPES[dtype]
        spans.append(Chunk(key, dtype, shape, position, stop, block))
        block += block_count(stop - position, block_bytes)
        position = stop
    layout = Layout(tuple(spans), 0, position, position + DIGEST_BYTES * block, block_bytes)
    if header_bytes is None:
        header_bytes = len(layout.header)
    chunks = tuple(
        replace(span, start=span.start + header_bytes, stop=span.stop + header_bytes)
        for span in spans
    )
    return Layout(
        chunks, header_bytes, header_bytes + layout.checksums_start,
        header_bytes + layout.total_bytes, block_bytes,
    )  # fmt: skip


def _header(layout: Layout) -> bytes:
    """Return the length, the JSON and its padding. Offsets count from the end of these."""
    metadata = {"algorithm": "xxh3_64", "block_bytes": str(layout.block_bytes)}
    content: dict[str, Any] = {METADATA: metadata}

    def add(key: str, dtype: str, shape: tuple[int, ...], start: int, stop: int) -> None:
        offsets = [start - layout.header_bytes, stop - layout.header_bytes]
        content[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}

    for chunk in layout.chunks:
        add(chunk.key, *stored_as(chunk.dtype, chunk.shape), chunk.start, chunk.stop)
    count = (layout.total_bytes - layout.checksums_start) // DIGEST_BYTES
    add(CHECKSUMS, "U64", (count,), layout.checksums_start, layout.total_bytes)
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-(8 + len(text)) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES - 8
    return length.to_bytes(8, "little") + text.ljust(length, b" ")
