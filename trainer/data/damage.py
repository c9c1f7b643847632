"""Samples that cannot be read: named, then refused, or left out and counted."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import DataError, PerdureError

TRIES = 10
"""So many in a row are no damaged samples: a bug, or a disk that is gone."""
_HOW_TO_SKIP = "repair or remove it, or leave such samples out and count them: "
_SETTING = "trainer.on_damaged=skip"


def is_damage(error: Exception) -> bool:
    """Return whether an error may be a sample's own; those of ours speak of whole files."""
    return not (is_lost_worker(error) or isinstance(error, (PerdureError, MemoryError)))


def is_lost_worker(error: BaseException) -> bool:
    """Return whether torch says that a process of a DataLoader was killed; no sample did that."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def name(dataset: Any, index: int) -> str:
    """Return which sample it is, with its path where the dataset has `describe(index)`."""
    describe = getattr(dataset, "describe", None)
    if describe is None:
        return f"sample {index:,}"
    shown = str(describe(index)).encode(errors="backslashreplace").decode()  # a path is any bytes
    return f"sample {index:,} ({shown})"


def reason(error: Exception) -> str:
    """Return the type, the text and the place of an error, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500] + place


def refuse(what: str, error: Exception) -> DataError:
    """Return the error that ends a run at a sample that cannot be read."""
    return DataError(f"{what} cannot be read: {reason(error)}; {_HOW_TO_SKIP}{_SETTING}")


def unlike(count: int, error: Exception) -> DataError | None:
    """Return what to say if an error is of default_collate, for samples that do not fit together.

    None: it is another one, such as a lack of memory.
    """
    is_size = isinstance(error, RuntimeError) and "equal size" in str(error)
    if not (is_size or isinstance(error, (TypeError, KeyError))):
        return None
    return DataError(
        f"{count:,} samples cannot become one batch: {reason(error)}; the dataset has to give "
        "tensors or numbers that have the same shape in every sample"
    )


def too_many(what: str, error: Exception) -> DataError:
    """Return the error that ends a run that skips, when there is nothing but damage."""
    return DataError(
        f"{what} and the {TRIES - 1} after it cannot be read, which is no damaged sample: a mistake"
        f" in the dataset, or files that are not there. The last: {reason(error)}"
    )


def whole(
    dataset: Any, indices: list[int], read: Callable[[int], object], *, skip: bool, replace: bool
) -> tuple[list[int], tuple[str, ...]]:
    """Return the samples to take for `indices`, and a text for each that cannot be read.

    Args:
        dataset: names its samples.
        indices: the samples that are wanted.
        read: reads one of them, and raises what is wrong with it.
        skip: go on; otherwise the first one is refused.
        replace: take the next one that can be read instead; otherwise, leave it out.

    Raises:
        DataError: a sample cannot be read, or too many in a row cannot.
    """
    chosen, texts = [], []
    for index in indices:
        for offset in range(TRIES):
            candidate = (index + offset) % len(dataset)
            try:
                read(candidate)
            except Exception as error:
                if not is_damage(error):
                    raise
                if not skip:
                    raise refuse(name(dataset, candidate), error) from error
                if offset == 0:
                    texts.append(f"{name(dataset, index)}: {reason(error)}")
                if not replace:
                    break
                if offset == TRIES - 1:
                    raise too_many(name(dataset, index), error) from error
            else:
                chosen.append(candidate)
                break
    return chosen, tuple(texts)
