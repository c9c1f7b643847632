"""Samples that cannot be read: reported by name, or skipped and counted."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.data import limits
from trainer.errors import DataError, PerdureError

TRIES = 10
"""Consecutive unreadable samples that indicate a bug or a lost disk instead of damaged samples."""


def is_damage(error: Exception) -> bool:
    """Return whether a single sample may have caused the error; Perdure's errors concern files."""
    is_other = isinstance(error, (PerdureError, MemoryError)) or is_lost_worker(error)
    return not is_other and limits.explain(error) is None


def is_lost_worker(error: BaseException) -> bool:
    """Return whether the error is torch's report of a killed DataLoader worker."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def describe(dataset: Any, index: int) -> str:
    """Return the sample's number, with its path if the dataset has `describe(index)`."""
    method = getattr(dataset, "describe", None)
    if method is None:
        return f"sample {index:,}"
    text = str(method(index)).encode(errors="backslashreplace").decode()  # paths are any bytes
    return f"sample {index:,} ({text})"


def reason(error: Exception) -> str:
    """Return type, text and source line of an error on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    location = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500] + location


def unreadable(sample: str, error: Exception) -> DataError:
    """Return the error that stops a run at an unreadable sample."""
    return DataError(
        f"{sample} cannot be read: {reason(error)}; repair or remove it, or skip and count "
        "unreadable samples: trainer.on_damaged=skip"
    )


def too_many(sample: str, error: Exception) -> DataError:
    """Return the error that stops a run which skips samples but cannot read any."""
    return DataError(
        f"{sample} and the {TRIES - 1} after it cannot be read: check the dataset code, or for "
        f"missing files. The last error: {reason(error)}"
    )


def mismatch(count: int, error: Exception) -> DataError | None:
    """Return a DataError if default_collate failed on samples of different shapes or types.

    Returns None for any other error, such as running out of memory.
    """
    is_size = isinstance(error, RuntimeError) and "equal size" in str(error)
    if not (is_size or isinstance(error, (TypeError, KeyError))):
        return None
    return DataError(
        f"{count:,} samples cannot become one batch: {reason(error)}; the dataset must return "
        "tensors or numbers of the same shape for every sample"
    )


def readable(
    dataset: Any, indices: list[int], read: Callable[[int], object], *, skip: bool, replace: bool
) -> tuple[list[int], tuple[str, ...]]:
    """Return the readable samples for `indices`, and one text per sample that cannot be read.

    Args:
        dataset: the samples.
        indices: requested sample numbers.
        read: reads one sample, and raises the error of a damaged one.
        skip: continue after a damaged sample; otherwise the first one raises.
        replace: use the next readable sample instead; otherwise leave the damaged one out.

    Raises:
        DataError: a sample cannot be read, or `TRIES` in a row cannot.
    """
    numbers, texts = [], []
    for index in indices:
        for offset in range(TRIES):
            candidate = (index + offset) % len(dataset)
            try:
                read(candidate)
            except Exception as error:
                if not is_damage(error):
                    raise
                if not skip:
                    raise unreadable(describe(dataset, candidate), error) from error
                if offset == 0:
                    texts.append(f"{describe(dataset, index)}: {reason(error)}")
                if not replace:
                    break
                if offset == TRIES - 1:
                    raise too_many(describe(dataset, index), error) from error
            else:
                numbers.append(candidate)
                break
    return numbers, tuple(texts)
