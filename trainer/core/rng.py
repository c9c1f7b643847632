"""Random number generators: derived seeds, and the state of every generator as uint8 tensors."""

import hashlib
import random
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_PYTHON = struct.Struct("<625I?d")  # 624 words and the position, then the cached Gaussian
_NUMPY = struct.Struct("<624IiId")


def derive(*parts: int | str) -> int:
    """Return a 63-bit seed that is a pure function of `parts` (BLAKE2b, RFC 7693)."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's, and torch's generators (CPU and every CUDA device)."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


def capture() -> dict[str, Tensor]:
    """Return the state of every generator of this process as 1-d uint8 CPU tensors, by name."""
    _, words, gauss = random.getstate()
    python = _PYTHON.pack(*words, gauss is not None, gauss or 0.0)
    state = np.random.get_state(legacy=False)
    mersenne = state["state"]
    numpy_bytes = _NUMPY.pack(
        *mersenne["key"].tolist(),
        mersenne["pos"],
        state["has_gauss"],
        state["gauss"],
    )
    states = {
        "python": _as_tensor(python),
        "numpy": _as_tensor(numpy_bytes),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states |= {
            f"cuda{index}": torch.cuda.get_rng_state(index)
            for index in range(torch.cuda.device_count())
        }
    return states


def restore(states: Mapping[str, Tensor]) -> None:
    """Put back what `capture` returned; a device that does not exist here is left out."""
    *words, has_gauss, gauss = _PYTHON.unpack(_as_bytes(states["python"]))
    random.setstate((3, tuple(words), gauss if has_gauss else None))
    *key, position, numpy_has_gauss, numpy_gauss = _NUMPY.unpack(_as_bytes(states["numpy"]))
    np.random.set_state(
        ("MT19937", np.array(key, dtype=np.uint32), position, numpy_has_gauss, numpy_gauss)
    )
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda{index}" in states:
                torch.cuda.set_rng_state(states[f"cuda{index}"], index)


@contextmanager
def forked(seed: int) -> Iterator[None]:
    """Run a block with generators seeded with `seed`, then put the previous states back."""
    states = capture()
    seed_all(seed)
    try:
        yield
    finally:
        restore(states)


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _as_bytes(states: Tensor) -> bytes:
    return states.numpy().tobytes()
