"""An export's answers, and how those of two differ."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.core.formatting import table
from trainer.errors import DataError, PerdureError
from trainer.export.contract import Runner
from trainer.export.inputs import Batch


@dataclass(frozen=True)
class Answer:
    """What the export said to one input."""

    name: str
    label: int | None
    """What it is, where that is known."""
    outputs: dict[str, npt.NDArray[Any]]

    @property
    def chances(self) -> npt.NDArray[Any] | None:
        """Probabilities of the classes, (classes,); None where the answer is none of a classifier.

        A single output of one axis with two numbers or more is taken for logits.
        """
        values = next(iter(self.outputs.values()))
        is_logits = len(self.outputs) == 1 and values.ndim == 1 and len(values) > 1
        if not (is_logits and np.issubdtype(values.dtype, np.floating)):
            return None
        raised = np.exp(values.astype(np.float64) - values.max())
        shares: npt.NDArray[Any] = raised / raised.sum()
        return shares


def predict(model: Runner, batches: Iterator[Batch], interface: object = "") -> Iterator[Answer]:
    """Yield the answer of an export to each input.

    Args:
        model: the export.
        batches: the inputs.
        interface: as the export's record has it; its text is told with an input that is not taken.

    Raises:
        DataError: an input does not fit the export.
    """
    for batch in batches:
        outputs = _run(model, batch, interface)
        labels: Sequence[int | None] = batch.labels or [None] * len(batch.names)
        for index, (name, label) in enumerate(zip(batch.names, labels, strict=True)):
            yield Answer(name, label, {key: values[index] for key, values in outputs.items()})


def _run(model: Runner, batch: Batch, interface: object = "") -> dict[str, npt.NDArray[Any]]:
    try:
        return model.run(batch.arrays)
    except PerdureError:
        raise
    except Exception as error:  # each library has its own
        shapes = ", ".join(f"{k} {v.dtype}{list(v.shape)}" for k, v in batch.arrays.items())
        line = next((text for text in str(error).splitlines() if text.strip()), "")
        made_with = f" (it was exported with {interface})" if str(interface) else ""
        raise DataError(f"the export does not take {shapes}{made_with}: {line}") from None


def compare(first: Runner, second: Runner, batches: Iterator[Batch], names: Sequence[str]) -> str:
    """Run two exports on the same inputs, in turn; return how they differ, and how fast each is."""
    models = (first, second)
    seconds: tuple[list[float], list[float]] = ([], [])
    counted, agreed, compared, largest, unlike = 0, 0, 0, 0.0, 0
    for number, batch in enumerate(batches):
        outputs = [_run(model, batch) for model in models]  # untimed: caches, what is compiled
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            _run(models[which], batch)
            seconds[which].append((time.perf_counter() - began) / len(batch.names))
        counted += len(batch.names)
        one, other = (list(each.values()) for each in outputs)
        if len(one) != len(other):
            raise DataError(f"they have other outputs: {len(one)} and {len(other)} of them")
        for left, right in zip(one, other, strict=True):
            if left.shape != right.shape:
                raise DataError(f"outputs have other shapes: {left.shape} and {right.shape}")
            left, right = left.astype(np.float64), right.astype(np.float64)
            finite = np.isfinite(left) & np.isfinite(right)
            unlike += int((~finite & ~((left == right) | (np.isnan(left) & np.isnan(right)))).sum())
            difference = np.abs(left[finite] - right[finite])
            largest = max(largest, float(difference.max(initial=0.0)))
        if one[0].ndim == 2 and one[0].shape[1] > 1:
            compared += len(batch.names)
            agreed += int((one[0].argmax(1) == other[0].argmax(1)).sum())
    if not counted:
        raise DataError("there are no inputs")
    rates = [1 / statistics.median(times) for times in seconds]
    rows = [
        ["export", "inputs/s"],
        *([n, f"{rate:,.0f}"] for n, rate in zip(names, rates, strict=True)),
    ]
    lines = [table(rows), f"largest difference of an output: {largest:.3g}"]
    if unlike:
        lines.append(f"NOT THE SAME: {unlike:,} values are infinite or no number in one of them")
    if compared:
        lines.append(f"same class for {agreed:,} of {compared:,} inputs ({agreed / compared:.2%})")
    return "\n".join(
        [*lines, f"the second is {rates[1] / rates[0]:.2f} times as fast as the first"]
    )
