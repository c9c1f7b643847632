"""Boxes: rectangular parts of tensors. Pure: no I/O, no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, order=True)
class Box:
    """A rectangular part of a tensor: its first index and its length along each axis."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def full(cls, shape: Sequence[int]) -> "Box":
        """Return the box of an entire tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.lengths)

    def overlaps(self, other: "Box") -> bool:
        """Return whether two boxes that are not empty have an element in common."""
        pairs = zip(self.offsets, self.lengths, other.offsets, other.lengths, strict=True)
        return all(a < b + m and b < a + n for a, n, b, m in pairs)

    def intersection(self, other: "Box") -> "Box":
        """Return the common part of two boxes, which may be empty."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        pairs = zip(self.offsets, self.lengths, other.offsets, other.lengths, strict=True)
        ends = (min(a + n, b + m) for a, n, b, m in pairs)
        return Box(offsets, tuple(max(end - o, 0) for end, o in zip(ends, offsets, strict=True)))

    def relative_to(self, outer: "Box") -> "Box":
        """Return this box with offsets counted from the start of `outer`."""
        pairs = zip(self.offsets, outer.offsets, strict=True)
        return Box(tuple(a - b for a, b in pairs), self.lengths)

    def shifted(self, axis: int, offset: int, length: int) -> "Box":
        """Return `length` rows along `axis`, from the row `offset` of this box."""
        offsets, lengths = list(self.offsets), list(self.lengths)
        offsets[axis] += offset
        lengths[axis] = length
        return Box(tuple(offsets), tuple(lengths))


def any_overlap(boxes: Iterable[Box]) -> bool:
    """Return whether two of the boxes overlap. Sweeps along the axis with the most cuts."""
    filled = [box for box in boxes if box.elements]
    if len(filled) < 2:
        return False
    if not filled[0].offsets:
        return True
    axis = max(range(len(filled[0].offsets)), key=lambda a: len({box.offsets[a] for box in filled}))
    active: list[Box] = []
    for box in sorted(filled, key=lambda box: box.offsets[axis]):
        start = box.offsets[axis]
        active = [b for b in active if b.offsets[axis] + b.lengths[axis] > start]
        if any(box.overlaps(other) for other in active):
            return True
        active.append(box)
    return False
