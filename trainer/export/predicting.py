"""Predictions of an export as tables and files, and the comparison of two exports."""

import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from trainer.core.atomic_file import atomic_file
from trainer.core.formatting import table
from trainer.core.nested import map_leaves
from trainer.errors import ConfigError, DataError, PerdureError
from trainer.export.contract import Runner
from trainer.export.inputs import Batch, InputSpec

_MAX_ROWS = 40
"""Maximum rows of the printed table."""


@dataclass(frozen=True)
class Prediction:
    """The outputs for one input."""

    name: str
    label: int | None
    """Class number, if known."""
    outputs: dict[str, npt.NDArray[Any]]

    @property
    def probabilities(self) -> npt.NDArray[Any] | None:
        """Class probabilities, (classes,); None if the export is not a classifier.

        A single one-dimensional output with two or more values is treated as logits.
        """
        values = next(iter(self.outputs.values()))
        is_logits = len(self.outputs) == 1 and values.ndim == 1 and len(values) > 1
        if not (is_logits and np.issubdtype(values.dtype, np.floating)):
            return None
        exponentials = np.exp(values.astype(np.float64) - values.max())
        probabilities: npt.NDArray[Any] = exponentials / exponentials.sum()
        return probabilities

    def as_json(self, classes: list[str] | None, top: int) -> dict[str, Any]:
        """Return the `top` most probable classes, or the outputs if it is not a classifier."""
        probabilities = self.probabilities
        if probabilities is None:
            return {"input": self.name} | {k: v.tolist() for k, v in self.outputs.items()}

        def name(index: int) -> str | int:
            is_named = classes is not None and len(classes) == len(probabilities)
            is_named = is_named and 0 <= index < len(probabilities)
            return classes[index] if classes is not None and is_named else index

        ranked = [
            {"class": name(int(index)), "probability": round(float(probabilities[index]), 6)}
            for index in np.argsort(-probabilities)[:top]
        ]
        line: dict[str, Any] = {"input": self.name, **ranked[0]}
        if top > 1:
            line["top"] = ranked
        if self.label is not None:
            line["label"] = name(self.label)
        return line


def predict(
    model: Runner, batches: Iterator[Batch], spec: InputSpec | None = None
) -> Iterator[Prediction]:
    """Yield the prediction for each input.

    Args:
        model: the export.
        batches: the inputs.
        spec: input specification of the export, for error messages.

    Raises:
        DataError: an input does not fit the export.
    """
    for batch in batches:
        outputs = _run(model, batch, spec)
        labels: Sequence[int | None] = batch.labels or [None] * len(batch.names)
        for index, (name, label) in enumerate(zip(batch.names, labels, strict=True)):
            yield Prediction(name, label, {key: values[index] for key, values in outputs.items()})


def _run(model: Runner, batch: Batch, spec: InputSpec | None = None) -> dict[str, Any]:
    try:
        return model.run(batch.arrays)
    except PerdureError:
        raise
    except Exception as error:  # each library has its own types
        shapes = ", ".join(f"{k} {v.dtype}{list(v.shape)}" for k, v in batch.arrays.items())
        line = next((text for text in str(error).splitlines() if text.strip()), "")
        expected = f" (it was exported with {spec})" if spec else ""
        raise DataError(f"the export does not accept {shapes}{expected}: {line}") from None


# --- output --------------------------------------------------------------------------------------


def report(predictions: Iterator[Prediction], spec: InputSpec, out: str, top: int) -> str:
    """Write the predictions to `out`, if any, and return the text to print.

    Args:
        predictions: the predictions.
        spec: input specification of the export.
        out: `.npz` for the outputs, any other name for JSON Lines; empty: print a table.
        top: classes per input.

    Raises:
        ConfigError: `out` is not writable.
    """
    if out.endswith(".npz"):
        return _save_arrays(list(predictions), Path(out))
    count, correct, labelled = 0, 0, 0
    rows: list[list[str]] = []
    is_classifier = False
    with _output(out) as file:
        for prediction in predictions:
            count += 1
            line = prediction.as_json(spec.classes, top)
            is_classifier = is_classifier or "class" in line
            if prediction.label is not None and prediction.probabilities is not None:
                labelled += 1
                correct += int(prediction.probabilities.argmax()) == prediction.label
            if file is not None:
                file.write((json.dumps(finite(line), ensure_ascii=False) + "\n").encode())
            elif count <= _MAX_ROWS:
                rows.append(_row(line))
    lines = []
    if rows:
        titles = ["class", "probability"] * top if is_classifier else ["output"] * len(rows[0])
        lines.append(table([["input", *titles[: len(rows[0]) - 1]], *rows]))
    if count > len(rows):
        rest = out or f"the first {len(rows)} are printed; out=FILE writes all"
        lines.append(f"{count:,} inputs, {rest}")
    if labelled:
        lines.append(f"accuracy {correct / labelled:.4f} of {labelled:,}")
    return "\n".join(lines)


@contextmanager
def _output(out: str) -> Iterator[IO[bytes] | None]:
    """Yield a file that appears at `out` only when complete; None without a name."""
    if not out:
        yield None
        return
    try:
        with atomic_file(Path(out), durable=False) as file:
            yield file
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written: {error.strerror}") from None


def _save_arrays(predictions: Sequence[Prediction], path: Path) -> str:
    names = predictions[0].outputs
    arrays = {
        name: np.stack([prediction.outputs[name] for prediction in predictions]) for name in names
    }
    with _output(str(path)) as file:  # given a path, NumPy would append a suffix
        np.savez(file, **arrays)  # type: ignore[arg-type]
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
    return f"{path}: {shapes}"


def finite(value: Any) -> Any:
    """Return a value for JSON, with null for NaN and infinity."""
    return map_leaves(lambda v: v if not isinstance(v, float) or math.isfinite(v) else None, value)


def _row(line: dict[str, Any]) -> list[str]:
    if "class" not in line:
        cells = [f"{key} {_short(line[key])}" for key in line if key != "input"]
        return [str(line["input"]), *cells]
    ranked = line.get("top", [line])
    cells = [cell for item in ranked for cell in (str(item["class"]), f"{item['probability']:.4f}")]
    return [str(line["input"]), *cells]


def _short(values: Any) -> str:
    text = json.dumps(values)
    return text if len(text) <= 40 else f"{text[:37]}..."


# --- comparison ----------------------------------------------------------------------------------


def compare_exports(
    first: Runner, second: Runner, batches: Iterator[Batch], names: Sequence[str]
) -> str:
    """Run two exports alternately on the same inputs; return their differences and speeds."""
    models = (first, second)
    seconds: tuple[list[float], list[float]] = ([], [])
    count, same_class, classified, nonfinite, largest = 0, 0, 0, 0, 0.0
    for number, batch in enumerate(batches):
        outputs = [_run(model, batch) for model in models]  # untimed warm-up
        for index in (0, 1) if number % 2 else (1, 0):
            start_s = time.perf_counter()
            _run(models[index], batch)
            seconds[index].append((time.perf_counter() - start_s) / len(batch.names))
        count += len(batch.names)
        one, other = (list(arrays.values()) for arrays in outputs)
        if len(one) != len(other):
            raise DataError(f"the exports have {len(one)} and {len(other)} outputs")
        for a, b in zip(one, other, strict=True):
            if a.shape != b.shape:
                raise DataError(f"the output shapes differ: {a.shape} and {b.shape}")
            a, b = a.astype(np.float64), b.astype(np.float64)
            finite = np.isfinite(a) & np.isfinite(b)
            nonfinite += int((~finite & ~((a == b) | (np.isnan(a) & np.isnan(b)))).sum())
            largest = max(largest, float(np.abs(a[finite] - b[finite]).max(initial=0.0)))
        if one[0].ndim == 2 and one[0].shape[1] > 1:
            classified += len(batch.names)
            same_class += int((one[0].argmax(1) == other[0].argmax(1)).sum())
    if not count:
        raise DataError("no inputs to compare the exports on")
    rates = [1 / statistics.median(times) for times in seconds]
    rows = [[name, f"{rate:,.0f}"] for name, rate in zip(names, rates, strict=True)]
    lines = [table([["export", "inputs/s"], *rows]), f"largest output difference: {largest:.3g}"]
    if nonfinite:
        lines.append(f"warning: {nonfinite:,} values are NaN or infinite in only one export")
    if classified:
        ratio = f"{same_class / classified:.2%}"
        lines.append(f"same class for {same_class:,} of {classified:,} inputs ({ratio})")
    lines.append(f"the second is {rates[1] / rates[0]:.2f} times as fast as the first")
    return "\n".join(lines)
