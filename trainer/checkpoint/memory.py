"""Page-aligned host memory for direct I/O and GPU copies, and tensors as bytes."""

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

PAGE_BYTES = 4096
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def to_pages(nbytes: int) -> int:
    """Round up to a multiple of the page size."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


class HostBuffer:
    """Page-aligned memory, reused between saves because the first touch of new memory is slow.

    Uses huge pages, as direct I/O needs one segment per page. Not inherited by forks, whose
    copy-on-write would break I/O in flight (open(2), NOTES on O_DIRECT).
    """

    def __init__(self, total_bytes: int, *, pinned: bool) -> None:
        size = to_pages(max(total_bytes, 1))
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            if hasattr(mmap, advice):
                self._memory.madvise(getattr(mmap, advice))
        self.array = np.frombuffer(self._memory, np.uint8)
        self.view = memoryview(self._memory)
        self.tensor = torch.from_numpy(self.array)
        self._pinned = pinned and self._pin()

    def _pin(self) -> bool:
        """Pin the memory for the GPU's copy engine. If that fails, copies are only slower."""
        runtime: Any = torch.cuda.cudart()
        return int(runtime.cudaHostRegister(self.array.ctypes.data, len(self.array), 0)) == 0

    def __del__(self) -> None:
        if getattr(self, "_pinned", False):
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(self.array.ctypes.data)

    def __len__(self) -> int:
        return len(self.array)


def is_plain(tensor: Tensor) -> bool:
    """Return whether the tensor's memory is its elements in order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def bits_of(dtype: torch.dtype) -> torch.dtype:
    """Return the integer type of the same size; a type of 16 bytes is returned unchanged."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return integers.get(dtype.itemsize, dtype)


def as_bits(tensor: Tensor) -> Tensor:
    """Return the tensor as integers of the same size, which can be copied for any dtype."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor.view(bits_of(tensor.dtype))


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a new CPU tensor of any dtype. torch warns about some if they are created directly."""
    return torch.empty(tuple(shape), dtype=bits_of(dtype)).view(dtype)


def bytes_of(tensor: Tensor) -> Bytes:
    """Return the memory of a contiguous CPU tensor."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # axes of length 1 have any stride
    data: Bytes = flat.view(torch.uint8).numpy()
    return data
