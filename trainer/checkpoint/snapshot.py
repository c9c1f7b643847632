"""The copy of a rank's part of the state, laid out exactly as its shard file will be."""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.checkpoint import manifest, shard
from trainer.checkpoint.plan import TORCH_DTYPES


class Snapshot:
    """A host buffer that is reused from save to save; first touch of fresh memory is slow."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def fill(self, layout: shard.Layout, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors that `layout` names; when it returns, they may change again."""
        if len(self._buffer) < layout.total_bytes:
            self._buffer = torch.empty(layout.total_bytes, dtype=torch.uint8)
        for chunk in layout.chunks:
            dtype = TORCH_DTYPES[chunk.dtype]
            place = self._buffer[chunk.start : chunk.stop].view(dtype).view(chunk.shape)
            place.copy_(tensors[chunk.key])

    def seal(self, layout: shard.Layout) -> tuple[memoryview, manifest.ShardFile]:
        """Compute the checksums, put the header in place; return the shard's bytes and record."""
        data = memoryview(self._buffer.numpy().data)[: layout.total_bytes]
        digests = [
            manifest.checksum(data[start : min(start + shard.BLOCK_BYTES, chunk.stop)])
            for chunk in layout.chunks
            for start in range(chunk.start, chunk.stop, shard.BLOCK_BYTES)
        ]
        header = shard.header(layout, digests)
        data[: layout.header_bytes] = header
        return data, manifest.ShardFile(
            layout.total_bytes, layout.header_bytes, manifest.checksum(header)
        )
