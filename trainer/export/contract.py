"""The contract of an export format: the `Format` record, and `Runner` for exports that can run.

To add a format, write a module with the functions of a `Format`, and add a row to
`formats.FORMATS`.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from trainer.errors import ConfigError, PerdureError

if TYPE_CHECKING:
    import numpy.typing as npt

    from trainer.export.exported_model import ExportedModel

Arrays: TypeAlias = "Mapping[str, npt.NDArray[Any]]"


class ExportError(PerdureError):
    """The model cannot be exported in this format, or an export cannot be used."""


class Runner(Protocol):
    """An opened export. Inputs may have any floating-point precision."""

    @property
    def inputs(self) -> Sequence[str]:
        """Input names, in order."""

    @property
    def outputs(self) -> Sequence[str]:
        """Output names, in order."""

    def run(self, inputs: Arrays) -> "dict[str, npt.NDArray[Any]]":
        """Return the outputs by name; bfloat16, which NumPy does not have, as float32."""


class Option(NamedTuple):
    """A `key=value` option of one format."""

    default: str
    help: str
    """Single line for --help."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A file format, as functions that write it and open it again."""

    suffix: str
    """Suffix of the file or folder name."""
    write: "Callable[[ExportedModel, Path, Mapping[str, str]], None]"
    """Write a file or folder at a path that does not exist yet, given the value of every option.

    The path is temporary, so its name must not appear in the bytes. The caller makes the result
    durable, describes it and renames it. OSError means that the location is not writable. Raises
    ConfigError (wrong option value, missing library) or ExportError (the model cannot be written
    in this format; the message names the operator or line, and a format that works).
    """
    open_runner: Callable[[Path, str], Runner] | None = None
    """Open the result of `write` on `cpu` or `cuda`; None for weights without a computation.

    Raises ConfigError (a library, a device or the model's code is missing) or ExportError (the
    file has another format, or was altered).
    """
    resumes: bool = False
    """True if the file resumes training, for which it needs the trained weights."""
    options: Mapping[str, Option] = field(default_factory=dict)
    libraries: Sequence[str] = ()
    """Packages whose versions are recorded, in addition to torch."""
    last_file: str = ""
    """File of a folder that is uploaded last, so that its presence marks a complete folder."""
    warning: str = ""
    """Printed after each export in this format."""


def library(name: str, extra: str = "export") -> Any:
    """Import a package that a format needs.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{name} is not installed ({error}): run pip install 'perdure[{extra}]'"
        ) from None


def is_true(options: Mapping[str, str], key: str) -> bool:
    """Return a boolean option.

    Raises:
        ConfigError: the value is neither true nor false.
    """
    if options[key] not in ("true", "false"):
        raise ConfigError(f"{key}={options[key]} is neither true nor false")
    return options[key] == "true"
