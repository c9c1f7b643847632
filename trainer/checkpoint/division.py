"""Division of tensors among the ranks that hold them. Pure: no I/O, no torch."""

from collections.abc import Sequence
from itertools import accumulate

from trainer.checkpoint.box import Box
from trainer.checkpoint.dtypes import DTYPES

_SLACK = 1 / 128
"""Imbalance a rank may accept, as a fraction of its bytes, to avoid splitting a tensor."""
_SLACK_BYTES = 1 << 12
"""Minimum of that imbalance, in bytes."""


def divide(
    items: Sequence[tuple[str, Box]], already_bytes: Sequence[int]
) -> list[list[tuple[int, Box]]]:
    """Divide tensors among their holders. Each writes a contiguous run; totals are balanced.

    Args:
        items: dtype and box of each tensor, in file order, all with the same holders.
        already_bytes: bytes that each holder writes in addition.

    Returns:
        Parts of each item, in order: index of the holder, and the box.
    """
    total = sum(box.elements * DTYPES[dtype] for dtype, box in items)
    ends = list(accumulate(_quotas(total, already_bytes)))
    slack = max(int(_SLACK * total / len(ends)), _SLACK_BYTES)
    holder, done = 0, 0  # current holder, and bytes assigned in total
    division = []
    for dtype, item in items:
        parts: list[tuple[int, Box]] = []
        rest, item_bytes = [item], DTYPES[dtype]
        while rest:
            is_last = holder == len(ends) - 1
            nbytes = total if is_last else ends[holder] - done
            head, tail = _cut(rest[0], nbytes, item_bytes, slack)
            parts += [(holder, box) for box in head]
            done += item_bytes * sum(box.elements for box in head)
            rest = tail + rest[1:]
            if tail:
                holder += 1
        division.append(parts)
    return division


def _quotas(total: int, already: Sequence[int]) -> list[int]:
    """Return each holder's bytes of `total` that make the sums with `already` as equal as possible.

    Like water that fills vessels of different heights.
    """
    heights = sorted(already)
    level, below = 0.0, sum(heights)
    for count in range(len(heights), 0, -1):
        level = (total + below) / count
        if level >= heights[count - 1]:
            break
        below -= heights[count - 1]
    return [max(0, round(level - height)) for height in already]


def _cut(box: Box, front_bytes: int, item_bytes: int, slack: int) -> tuple[list[Box], list[Box]]:
    """Cut about `front_bytes` off the front of a box, in memory order."""
    nbytes = box.elements * item_bytes
    if nbytes <= front_bytes + slack:
        return [box], []
    if front_bytes <= slack:
        return [], [box]
    axis = next(axis for axis, length in enumerate(box.lengths) if length > 1)
    row_bytes = nbytes // box.lengths[axis]
    rows = (front_bytes + slack) // row_bytes
    head, tail = _split(box, axis, rows)
    front = [head] if rows else []
    if front_bytes - rows * row_bytes <= slack:
        return front, [tail]
    row, tail = _split(tail, axis, 1)
    row_front, row_rest = _cut(row, front_bytes - rows * row_bytes, item_bytes, slack)
    return front + row_front, [*row_rest, tail] if tail.elements else row_rest


def _split(box: Box, axis: int, rows: int) -> tuple[Box, Box]:
    return box.shifted(axis, 0, rows), box.shifted(axis, rows, box.lengths[axis] - rows)
