"""Headers of shards of format version 1, which hold the block checksums. Pure: no I/O, no torch.

Version 1 is read, never written. `__metadata__.blocks` concatenates the checksums of the data in
file order, 16 hexadecimal digits for each block.
"""

import json
from operator import index

from trainer.checkpoint.dtypes import DTYPES
from trainer.checkpoint.shard import METADATA, Chunk, block_count, element_count
from trainer.errors import CheckpointError

_DIGITS = 16


def parse_header(
    data: bytes, *, total_bytes: int, where: str, block_bytes: int
) -> tuple[dict[str, Chunk], list[int]]:
    """Parse a shard's header, after its checksum was verified.

    Returns:
        The chunks by key, and the checksums of all blocks in file order. Chunks have the stored
        dtype and shape: C128 is F64 with a last axis of 2.

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
        if not isinstance(blocks, str) or len(blocks) != block * _DIGITS:
            raise ValueError(f"{len(blocks):,} checksum digits for {block:,} blocks")
        digests = [int(blocks[i : i + _DIGITS], 16) for i in range(0, len(blocks), _DIGITS)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: not a checkpoint shard: {error}") from None
    return chunks, digests
