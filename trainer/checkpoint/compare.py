"""What two checkpoints have in common and what not, a few MiB of each in memory at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf, prod, sqrt
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.box import Box
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.plan import TORCH_DTYPES
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.values import TensorRef

_BATCH_BYTES = 8 << 20


@dataclass
class TensorChange:
    """How far a tensor of one checkpoint is from the tensor of that name in the other."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    changed_elements: int = 0
    """Elements that are not equal; 0 where only zeros changed their sign, or NaNs their bits."""
    largest: float = 0.0
    """Largest absolute difference; infinite where only one of the two is a number."""
    relative: float = 0.0
    """Euclidean norm of the difference, divided by that of the first tensor."""


@dataclass
class Comparison:
    """What differs between two checkpoints."""

    changed: list[TensorChange] = field(default_factory=list)
    equal: int = 0
    """Tensors that are equal, bit by bit."""
    recast: list[tuple[str, str, str]] = field(default_factory=list)
    """Name, and dtype and shape in each, of tensors that cannot be compared."""
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    values: list[tuple[str, Any, Any]] = field(default_factory=list)
    """Dotted key of every other value that differs, and both; `ABSENT` where one has none."""

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not (
            self.changed or self.recast or self.only_first or self.only_second or self.values
        )


ABSENT = "(absent)"


def compare(
    first: tuple[Manifest, Reader],
    second: tuple[Manifest, Reader],
    progress: Callable[[int], object] = lambda compared_bytes: None,
) -> Comparison:
    """Compare two checkpoints, each given by its manifest and what reads it.

    Reads every byte of the tensors that both have. `progress` is told how many more bytes of one
    of them were compared.

    Raises:
        DamagedError: bytes of one of them are proven wrong.
    """
    (one, one_reader), (other, other_reader) = first, second
    found = Comparison(
        only_first=sorted(one.tensors.keys() - other.tensors.keys()),
        only_second=sorted(other.tensors.keys() - one.tensors.keys()),
    )
    common = []
    for name in sorted(one.tensors.keys() & other.tensors.keys()):
        alias = one.tensors[name].alias
        if alias is not None and alias == other.tensors[name].alias:
            continue  # it is compared under its own name
        mine, theirs = one.resolve(name), other.resolve(name)
        if (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape):
            common.append(name)
        else:
            found.recast.append((name, _described(one, name), _described(other, name)))
    changes = {name: _Change(name, one) for name in common}
    for batch in _batches(one, common):
        pairs = []
        for name, box in batch:
            dtype = TORCH_DTYPES[one.resolve(name).dtype]
            pairs.append(
                (torch.empty(box.lengths, dtype=dtype), torch.empty(box.lengths, dtype=dtype))
            )
        named = list(zip(batch, pairs, strict=True))
        one_reader.read_boxes((name, box, pair[0]) for (name, box), pair in named)
        other_reader.read_boxes((name, box, pair[1]) for (name, box), pair in named)
        for (name, _), (first_part, second_part) in named:
            changes[name].add(first_part, second_part)
            progress(first_part.nbytes)
    found.changed = [change.result() for change in changes.values() if change.differs]
    found.equal = len(changes) - len(found.changed)
    before, after = _values(one), _values(other)
    for key in sorted({*before, *after}):
        old, new = before.get(key, ABSENT), after.get(key, ABSENT)
        if type(old) is not type(new) or (old != new and not (old != old and new != new)):
            found.values.append((key, old, new))
    return found


def _described(manifest: Manifest, name: str) -> str:
    entry = manifest.resolve(name)
    return f"{entry.dtype} {list(entry.shape)}"


class _Change:
    """Sums over the parts of one tensor."""

    def __init__(self, name: str, manifest: Manifest) -> None:
        entry = manifest.resolve(name)
        self._found = TensorChange(name, entry.dtype, entry.shape)
        self._squares, self._own_squares = 0.0, 0.0
        self.differs = False

    def add(self, mine: Tensor, theirs: Tensor) -> None:
        bits, other_bits = (t.reshape(-1).view(torch.uint8) for t in (mine, theirs))
        is_equal = torch.equal(bits, other_bits)
        one, other = _numbers(mine), _numbers(theirs)
        self._own_squares += _finite(one.double()).square().sum().item()
        if is_equal:
            return
        self.differs = True
        unequal = (one != other) & ~(one.isnan() & other.isnan())
        distance = (other.double() - one.double()).abs()
        distance = torch.where(unequal, distance.nan_to_num(nan=inf, posinf=inf), 0.0)
        self._found.changed_elements += int(unequal.reshape(*mine.shape, -1).any(-1).sum())
        self._found.largest = max(self._found.largest, distance.max().item())
        self._squares += _finite(distance).square().sum().item()

    def result(self) -> TensorChange:
        if self._found.largest == inf:
            self._found.relative = inf
            return self._found
        own = sqrt(self._own_squares)
        self._found.relative = sqrt(self._squares) / own if own else (inf if self._squares else 0.0)
        return self._found


def _numbers(tensor: Tensor) -> Tensor:
    found = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return found.float() if found.element_size() == 1 and found.is_floating_point() else found


def _finite(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _batches(manifest: Manifest, names: Iterable[str]) -> Iterator[list[tuple[str, Box]]]:
    """Yield boxes of the tensors, together of bounded size."""
    batch: list[tuple[str, Box]] = []
    room = _BATCH_BYTES
    for name in names:
        entry = manifest.resolve(name)
        item_bytes = TORCH_DTYPES[entry.dtype].itemsize
        for box in _boxes((0,) * len(entry.shape), entry.shape, _BATCH_BYTES // item_bytes):
            if batch and box.elements * item_bytes > room:
                yield batch
                batch, room = [], _BATCH_BYTES
            batch.append((name, box))
            room -= box.elements * item_bytes
    if batch:
        yield batch


def _boxes(offsets: tuple[int, ...], lengths: tuple[int, ...], most: int) -> Iterator[Box]:
    """Cut a box into boxes of at most so many elements, along the first axis that is long."""
    if prod(lengths) <= most:
        yield Box(offsets, lengths)
        return
    axis = next(axis for axis, length in enumerate(lengths) if length > 1)
    rows = max(most // prod(lengths[axis + 1 :]), 1)
    for start in range(0, lengths[axis], rows):
        inner = list(offsets), list(lengths)
        inner[0][axis] += start
        inner[1][axis] = min(rows, lengths[axis] - start)
        yield from _boxes(tuple(inner[0]), tuple(inner[1]), most)


def _values(manifest: Manifest) -> dict[str, Any]:
    """Return every value that is not a tensor, by dotted key."""
    top = {"step": manifest.step, "epoch": manifest.epoch, "samples": manifest.samples}
    return {
        **top,
        **dict(leaves(manifest.objects)),
        **{f"config.{key}": value for key, value in leaves(manifest.config)},
    }


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values inside dicts and lists of dicts, each with its dotted key."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, f"{key}[{index}]")
    elif not isinstance(value, TensorRef):
        yield key, value
