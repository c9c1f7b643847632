"""Whether an export answers as its model does, on the same samples."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.errors import PerdureError
from trainer.export.contract import ExportError, Runner
from trainer.export.subject import Subject

TOLERANCES = {
    torch.float64: (1e-5, 1e-4), torch.float32: (1e-5, 1e-4), torch.float16: (2e-3, 1e-2),
    torch.bfloat16: (1e-2, 5e-2),
}  # fmt: skip
"""Allowed differences by the dtype of an output: absolute, and in shares of its largest value."""


@dataclass(frozen=True)
class Difference:
    """How far one output of an export is from the model's, at most, over all samples."""

    output: str
    max_abs: float
    max_rel: float
    """`max_abs` in shares of the largest magnitude of this output."""
    allowed: float
    """`max_abs` above which the export fails: atol + rtol * the largest magnitude."""

    def as_json(self) -> dict[str, Any]:
        """Return it for the record."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.output}: max abs {self.max_abs:.2e}, max rel {self.max_rel:.2e}"


def compare(
    subject: Subject,
    runner: Runner,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    atol: float | None = None,
    rtol: float | None = None,
) -> list[Difference]:
    """Run an export and the model in eval mode on the same inputs.

    Args:
        subject: what was exported.
        runner: the export.
        batches: inputs by name, as `Subject.inputs` gives them.
        atol: allowed difference; None: by the output's dtype, `TOLERANCES`.
        rtol: the same in shares of an output's largest magnitude.

    Raises:
        ExportError: they differ by more than is allowed, or one of the batches cannot be run.
    """
    found: dict[str, Difference] = {}
    for inputs in batches:
        size = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        wanted = subject.answer(inputs)
        try:
            given = runner.run({name: as_array(tensor) for name, tensor in inputs.items()})
        except PerdureError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ExportError(
                f"the export does not run with {size}, but the model does: "
                f"{lines[0] if len(lines[0]) > 20 else lines[-1]}\nSizes that were seen when it "
                "was traced may be fixed in it: look for int(…), len(…) or view(2, …) in forward"
            ) from None
        if set(given) != set(wanted):
            raise ExportError(f"the export returns {sorted(given)}, the model {sorted(wanted)}")
        for name, tensor in wanted.items():
            new = _difference(name, tensor, given[name], size, atol, rtol)
            old = found.get(name)
            worse = old is None or new.max_abs / new.allowed > old.max_abs / old.allowed
            found[name] = new if worse or old is None else old
    return list(found.values())


def as_array(tensor: Tensor) -> npt.NDArray[Any]:
    """Return a tensor as NumPy's; bfloat16 as float32."""
    tensor = tensor.detach().cpu()
    array: npt.NDArray[Any] = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def _difference(
    name: str,
    tensor: Tensor,
    given: npt.NDArray[Any],
    size: str,
    atol: float | None,
    rtol: float | None,
) -> Difference:
    wanted = as_array(tensor)
    if given.shape != wanted.shape or given.dtype != wanted.dtype:
        raise ExportError(
            f"with {size}, {name} of the export is {given.dtype}{list(given.shape)}, the "
            f"model's {wanted.dtype}{list(wanted.shape)}: sizes or types that were seen when it "
            "was traced are fixed in it"
        )
    exact, share = TOLERANCES.get(tensor.dtype, (0.0, 0.0))
    exact, share = exact if atol is None else atol, share if rtol is None else rtol
    a, b = given.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(b)
    same_rest = np.array_equal(a[~finite], b[~finite], equal_nan=True)
    error = float(np.abs(a[finite] - b[finite]).max(initial=0.0)) if same_rest else np.inf
    largest = float(np.abs(b[finite]).max(initial=0.0))
    allowed = exact + share * largest
    if not error <= allowed:
        raise ExportError(
            f"the export does not answer as the model does: with {size}, {name} differs "
            f"by {error:.3g} at most, and {allowed:.3g} is allowed (its largest value is "
            f"{largest:.3g}). Data-dependent branches that a trace fixes do this, and lower "
            "precision; atol=… and rtol=… allow more"
        )
    return Difference(name, error, error / largest if largest else 0.0, max(allowed, 1e-300))


def refuse_chance(subject: Subject) -> None:
    """Refuse a model that answers the same inputs differently each time.

    Raises:
        ExportError: it does.
    """
    inputs = subject.inputs(2)
    first, second = subject.answer(inputs), subject.answer(inputs)
    for name, tensor in first.items():
        if not torch.equal(tensor.nan_to_num(), second[name].nan_to_num()):
            raise ExportError(
                f"the model's {name} is another one each time, in eval mode and on the same "
                "inputs, so no export can be compared with it. Does forward draw random numbers, "
                "or call F.dropout without training=self.training?"
            )
