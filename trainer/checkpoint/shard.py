"""Shard layout: a safetensors file with a checksum for every block. Pure: no I/O, no torch.

The layout is that of safetensors (eight bytes of header length, a JSON header, the tensors without
holes), restricted so that equal content gives equal files: tensors are ordered by decreasing item
size, then by name, and the header is padded with spaces to a multiple of 4096 bytes.
`__metadata__.blocks` holds the checksums of the data in file order, one for each block of at most
1 MiB. Every tensor starts a new block.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any

from trainer.errors import CheckpointError

ALIGNMENT_BYTES = 4096
BLOCK_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors' own readers
DIGEST_DIGITS = 16
METADATA = "__metadata__"

DTYPES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "C128": 16,
}  # fmt: skip
"""Bytes per element of each dtype. C128 is not in safetensors: stored as F64, last axis 2."""


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
    """Positions of the header and all chunks in a new shard."""

    chunks: tuple[Chunk, ...]
    header_bytes: int
    total_bytes: int

    def blocks(self) -> list[tuple[int, int]]:
        """Return (start, stop) of every block that has a checksum, in file order."""
        return [
            (start, min(start + BLOCK_BYTES, chunk.stop))
            for chunk in self.chunks
            for start in range(chunk.start, chunk.stop, BLOCK_BYTES)
        ]


def block_count(nbytes: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Return the number of blocks in a chunk of `nbytes`."""
    return -(-nbytes // block_bytes)


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> Layout:
    """Return the layout for (key, dtype, shape) triples, independent of their order."""
    ordered = sorted(tensors, key=lambda item: (-DTYPES[item[1]], item[0]))
    spans, position, blocks = [], 0, 0
    for key, dtype, shape in ordered:
        nbytes = element_count(shape) * DTYPES[dtype]
        spans.append(Chunk(key, dtype, shape, position, position + nbytes, blocks))
        position += nbytes
        blocks += block_count(nbytes)
    unpadded = len(_header_json(spans, 0, "0" * (DIGEST_DIGITS * blocks)))
    header_bytes = -(-(8 + unpadded) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    chunks = tuple(
        replace(span, start=span.start + header_bytes, stop=span.stop + header_bytes)
        for span in spans
    )
    return Layout(chunks, header_bytes, header_bytes + position)


def header(layout: Layout, digests: Sequence[str]) -> bytes:
    """Return the first `layout.header_bytes` bytes of a shard with these block checksums."""
    text = _header_json(layout.chunks, layout.header_bytes, "".join(digests))
    length = layout.header_bytes - 8
    return length.to_bytes(8, "little") + text.ljust(length, b" ")


def _header_json(chunks: Sequence[Chunk], data_start: int, blocks: str) -> bytes:
    content: dict[str, Any] = {METADATA: {"algorithm": "xxh3_64", "blocks": blocks}}
    for chunk in chunks:
        shape = list(chunk.shape)
        content[chunk.key] = {
            "dtype": "F64" if chunk.dtype == "C128" else chunk.dtype,
            "shape": [*shape, 2] if chunk.dtype == "C128" else shape,
            "data_offsets": [chunk.start - data_start, chunk.stop - data_start],
        }
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def parse_header(
    data: bytes, *, total_bytes: int, where: str, block_bytes: int = BLOCK_BYTES
) -> tuple[dict[str, Chunk], list[str]]:
    """Parse a shard's header, after its checksum was verified.

    Returns:
        The chunks by key, and the checksums of all blocks in file order.

    Raises:
        CheckpointError: not a safetensors header, or it has holes, overlaps or wrong sizes.
    """
    try:
        if int.from_bytes(data[:8], "little") != len(data) - 8:
            raise ValueError(f"the header's length is not {len(data) - 8:,}")
        content = json.loads(data[8:])
        metadata = content.pop(METADATA)
        blocks = metadata["blocks"]
        chunks, position, block = {}, len(data), 0
        for key, value in content.items():
            start, stop = (len(data) + index(offset) for offset in value["data_offsets"])
            shape = tuple(index(n) for n in value["shape"])
            nbytes = element_count(shape) * DTYPES[value["dtype"]]
            if start != position or stop - start != nbytes or min(shape, default=0) < 0:
                raise ValueError(f"{key!r} is at {start:,} to {stop:,} instead of {position:,}")
            chunks[key] = Chunk(key, value["dtype"], shape, start, stop, block)
            position, block = stop, block + block_count(nbytes, block_bytes)
        if position != total_bytes:
            raise ValueError(f"its tensors end at {position:,}, but the file at {total_bytes:,}")
        if not isinstance(blocks, str) or len(blocks) != block * DIGEST_DIGITS:
            raise ValueError(f"{len(blocks):,} checksum digits for {block:,} blocks")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: not a checkpoint shard: {error}") from None
    digests = [blocks[i : i + DIGEST_DIGITS] for i in range(0, len(blocks), DIGEST_DIGITS)]
    return chunks, digests
