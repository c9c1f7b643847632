"""Compare two checkpoints with a few MiB of each in memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.box import Box
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.plan import TORCH_DTYPES
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.values import leaves

_BATCH_BYTES = 8 << 20


@dataclass
class TensorChange:
    """Difference between the tensors of one name in two checkpoints."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    changed_elements: int = 0
    """Number of unequal elements; 0 if only signs of zeros or bits of NaNs differ."""
    largest: float = 0.0
    """Largest absolute difference; infinite if only one of the two is finite."""
    relative: float = 0.0
    """Euclidean norm of the difference, divided by that of the first tensor."""


@dataclass
class Comparison:
    """Differences between two checkpoints."""

    changed: list[TensorChange] = field(default_factory=list)
    equal: int = 0
    """Number of tensors with equal bits."""
    recast: list[tuple[str, str, str]] = field(default_factory=list)
    """Name, and dtype and shape in each checkpoint, of tensors that cannot be compared."""
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    values: list[tuple[str, Any, Any]] = field(default_factory=list)
    """Dotted key and both values of every other difference; `ABSENT` for a missing value."""

    @property
    def is_equal(self) -> bool:
        """Return whether everything is equal."""
        return not (
            self.changed or self.recast or self.only_first or self.only_second or self.values
        )


ABSENT = "(absent)"
"""Placeholder for a missing value."""


def compare(
    first: tuple[Manifest, Reader],
    second: tuple[Manifest, Reader],
    progress: Callable[[int], object] = lambda compared_bytes: None,
) -> Comparison:
    """Compare two checkpoints. Reads every byte of the tensors that both have.

    Args:
        first: manifest and reader of one checkpoint.
        second: manifest and reader of the other.
        progress: called with the number of bytes compared since the last call.

    Raises:
        DamagedError: a checksum does not match.
    """
    (one, one_reader), (other, other_reader) = first, second
    comparison = Comparison(
        only_first=sorted(one.tensors.keys() - other.tensors.keys()),
        only_second=sorted(other.tensors.keys() - one.tensors.keys()),
    )
    common = []
    for name in sorted(one.tensors.keys() & other.tensors.keys()):
        alias = one.tensors[name].alias
        if alias is not None and alias == other.tensors[name].alias:
            continue  # compared as the aliased tensor
        entry, other_entry = one.resolve(name), other.resolve(name)
        if (entry.dtype, entry.shape) == (other_entry.dtype, other_entry.shape):
            common.append(name)
        else:
            comparison.recast.append((name, _described(one, name), _described(other, name)))
    changes = {name: _Change(name, one) for name in common}
    for batch in _batches(one, common):
        parts = _read(one, one_reader, batch)
        other_parts = _read(other, other_reader, batch)
        for (name, _), part, other_part in zip(batch, parts, other_parts, strict=True):
            changes[name].add(part, other_part)
            progress(part.nbytes)
    comparison.changed = [change.result() for change in changes.values() if change.differs]
    comparison.equal = len(changes) - len(comparison.changed)
    before, after = _values(one), _values(other)
    for key in sorted({*before, *after}):
        old, new = before.get(key, ABSENT), after.get(key, ABSENT)
        if type(old) is not type(new) or (old != new and not (old != old and new != new)):
            comparison.values.append((key, old, new))
    return comparison


def _read(manifest: Manifest, reader: Reader, boxes: Sequence[tuple[str, Box]]) -> list[Tensor]:
    dtypes = [TORCH_DTYPES[manifest.resolve(name).dtype] for name, _ in boxes]
    parts = [torch.empty(box.lengths, dtype=t) for (_, box), t in zip(boxes, dtypes, strict=True)]
    reader.read_boxes((name, box, part) for (name, box), part in zip(boxes, parts, strict=True))
    return parts


def _described(manifest: Manifest, name: str) -> str:
    entry = manifest.resolve(name)
    return f"{entry.dtype} {list(entry.shape)}"


class _Change:
    """Accumulated differences of one tensor."""

    def __init__(self, name: str, manifest: Manifest) -> None:
        entry = manifest.resolve(name)
        self._change = TensorChange(name, entry.dtype, entry.shape)
        self._squares, self._first_squares = 0.0, 0.0
        self.differs = False

    def add(self, first: Tensor, second: Tensor) -> None:
        bits, other_bits = (t.reshape(-1).view(torch.uint8) for t in (first, second))
        is_equal = torch.equal(bits, other_bits)
        one, other = _real(first), _real(second)
        self._first_squares += _finite(one.double()).square().sum().item()
        if is_equal:
            return
        self.differs = True
        unequal = (one != other) & ~(one.isnan() & other.isnan())
        distance = (other.double() - one.double()).abs()
        distance = torch.where(unequal, distance.nan_to_num(nan=inf, posinf=inf), 0.0)
        self._change.changed_elements += int(unequal.reshape(*first.shape, -1).any(-1).sum())
        self._change.largest = max(self._change.largest, distance.max().item())
        self._squares += _finite(distance).square().sum().item()

    def result(self) -> TensorChange:
        if self._change.largest == inf:
            self._change.relative = inf
            return self._change
        norm = sqrt(self._first_squares)
        self._change.relative = (
            sqrt(self._squares) / norm if norm else (inf if self._squares else 0.0)
        )
        return self._change


def _real(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.float() if real.element_size() == 1 and real.is_floating_point() else real


def _finite(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _batches(manifest: Manifest, names: Iterable[str]) -> Iterator[list[tuple[str, Box]]]:
    """Yield batches of tensor boxes with at most `_BATCH_BYTES` each."""
    batch: list[tuple[str, Box]] = []
    room = _BATCH_BYTES
    for name in names:
        entry = manifest.resolve(name)
        item_bytes = TORCH_DTYPES[entry.dtype].itemsize
        for box in _boxes(Box.full(entry.shape), _BATCH_BYTES // item_bytes):
            if batch and box.elements * item_bytes > room:
                yield batch
                batch, room = [], _BATCH_BYTES
            batch.append((name, box))
            room -= box.elements * item_bytes
    if batch:
        yield batch


def _boxes(box: Box, max_elements: int) -> Iterator[Box]:
    """Split a box into boxes of at most `max_elements`, along its first axis longer than 1."""
    if box.elements <= max_elements:
        yield box
        return
    axis, length = next((a, n) for a, n in enumerate(box.lengths) if n > 1)
    rows = max(max_elements * length // box.elements, 1)
    for start in range(0, length, rows):
        yield from _boxes(box.shifted(axis, start, min(rows, length - start)), max_elements)


def _values(manifest: Manifest) -> dict[str, Any]:
    """Return every value other than tensors, by dotted key."""
    top = {"step": manifest.step, "epoch": manifest.epoch, "samples": manifest.samples}
    return {
        **top,
        **dict(leaves(manifest.objects)),
        **{f"config.{key}": value for key, value in leaves(manifest.config)},
    }
