"""The parity check: the outputs of an export against the model's, on the same samples."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.errors import PerdureError
from trainer.export.contract import ExportError, Runner
from trainer.export.exported_model import ExportedModel

TOLERANCES = {
    torch.float64: (1e-5, 1e-4), torch.float32: (1e-5, 1e-4), torch.float16: (2e-3, 1e-2),
    torch.bfloat16: (1e-2, 5e-2),
}  # fmt: skip
"""Default (atol, rtol) by output dtype; rtol is relative to the output's largest magnitude."""


@dataclass(frozen=True)
class Mismatch:
    """The maximum error of one output of an export, over all samples."""

    output: str
    max_abs: float
    max_rel: float
    """`max_abs` relative to the output's largest magnitude."""
    allowed: float
    """Limit of `max_abs`: atol + rtol * the largest magnitude."""

    def as_json(self) -> dict[str, Any]:
        """Return it for the record."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.output}: max abs {self.max_abs:.2e}, max rel {self.max_rel:.2e}"


def check_parity(
    model: ExportedModel,
    runner: Runner,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    atol: float | None = None,
    rtol: float | None = None,
) -> list[Mismatch]:
    """Run an export and the model in eval mode on the same inputs; return the maximum errors.

    Args:
        model: the exported model.
        runner: the export.
        batches: inputs by name, as `ExportedModel.inputs` returns them.
        atol: absolute tolerance; None: `TOLERANCES` by output dtype.
        rtol: tolerance relative to an output's largest magnitude; None: same.

    Raises:
        ExportError: an error exceeds the tolerance, or a batch cannot be run.
    """
    worst: dict[str, Mismatch] = {}
    for inputs in batches:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        expected = model.compute(inputs)
        try:
            outputs = runner.run({name: as_array(tensor) for name, tensor in inputs.items()})
        except PerdureError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ExportError(
                f"the export does not run with {shapes}, but the model does: "
                f"{lines[0] if len(lines[0]) > 20 else lines[-1]}\nIt may have fixed a size from "
                "tracing: look for int(…), len(…) or view(2, …) in forward"
            ) from None
        if set(outputs) != set(expected):
            raise ExportError(f"the export returns {sorted(outputs)}, the model {sorted(expected)}")
        for name, tensor in expected.items():
            new = _mismatch(name, tensor, outputs[name], shapes, atol, rtol)
            old = worst.get(name, new)
            worst[name] = max(old, new, key=lambda mismatch: mismatch.max_abs / mismatch.allowed)
    return list(worst.values())


def as_array(tensor: Tensor) -> npt.NDArray[Any]:
    """Convert a tensor to NumPy; bfloat16 to float32."""
    tensor = tensor.detach().cpu()
    array: npt.NDArray[Any] = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def _mismatch(
    name: str,
    tensor: Tensor,
    output: npt.NDArray[Any],
    shapes: str,
    atol: float | None,
    rtol: float | None,
) -> Mismatch:
    expected = as_array(tensor)
    if output.shape != expected.shape or output.dtype != expected.dtype:
        raise ExportError(
            f"with {shapes}, output {name} is {output.dtype}{list(output.shape)} in the export but "
            f"{expected.dtype}{list(expected.shape)} in the model: tracing fixed a size or a dtype"
        )
    default_atol, default_rtol = TOLERANCES.get(tensor.dtype, (0.0, 0.0))
    atol, rtol = default_atol if atol is None else atol, default_rtol if rtol is None else rtol
    a, b = output.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    same_rest = np.array_equal(a[~finite], b[~finite], equal_nan=True)
    error = float(np.abs(a[finite] - b[finite]).max(initial=0.0)) if same_rest else np.inf
    largest = float(np.abs(b[finite]).max(initial=0.0))
    allowed = atol + rtol * largest
    if not error <= allowed:
        raise ExportError(
            f"the export and the model disagree: with {shapes}, output {name} differs by up to "
            f"{error:.3g}, but at most {allowed:.3g} is allowed (its largest value is "
            f"{largest:.3g}). Check for data-dependent branches that a trace fixes; for lower "
            "precision, raise atol=… or rtol=…"
        )
    return Mismatch(name, error, error / largest if largest else 0.0, max(allowed, 1e-300))


def check_determinism(model: ExportedModel) -> None:
    """Check that the model returns the same outputs for the same inputs.

    Raises:
        ExportError: it does not.
    """
    inputs = model.inputs(2)
    first, second = model.compute(inputs), model.compute(inputs)
    for name, tensor in first.items():
        if not torch.equal(tensor.nan_to_num(), second[name].nan_to_num()):
            raise ExportError(
                f"the model's {name} differs between two calls with the same inputs in eval mode, "
                "so exports cannot be compared with it. Check forward for random numbers, or "
                "F.dropout without training=self.training"
            )
