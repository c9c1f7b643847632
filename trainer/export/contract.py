"""What a format is: a module that writes a subject, and perhaps opens again what it wrote.

Nothing here is a base class; a module of `trainer.export` with these names is a format. To add
one, write the module and enter it in `formats.FORMATS`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy.typing as npt

from trainer.errors import ConfigError, PerdureError
from trainer.export.subject import Subject

Arrays = Mapping[str, npt.NDArray[Any]]


class Format(Protocol):
    """A way to write a checkpoint.

    A module may also have `LAST`: the name of the file that is written last into a folder, so that
    its presence says that the others are there.
    """

    SUFFIX: str
    """What the name of the file or folder ends in."""
    OPTIONS: Mapping[str, str]
    """The format's own options `key=value` with their defaults."""
    HELP: Mapping[str, str]
    """Of each option, one line for --help."""

    def write(self, subject: Subject, path: Path, options: Mapping[str, str]) -> None:
        """Write a file or a folder at `path`, which does not exist yet; return when it is whole.

        The path is a temporary one, so its name must not get into the bytes. The command makes
        the file or folder durable, describes it, and renames it. `options` has every key of
        `OPTIONS`. OSError means that it cannot be written there.

        Raises:
            ConfigError: an option has a wrong value, or a library of an extra is missing.
            ExportError: this model cannot be written in this format; the message says which
                operator or line stands against it, and which format would do.
        """


class Runner(Protocol):
    """An export that can be called. Floats that it takes may be given in any precision."""

    @property
    def inputs(self) -> Sequence[str]:
        """Names of what goes in, in order."""

    @property
    def outputs(self) -> Sequence[str]:
        """Names of what comes out, in order."""

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs by name; bfloat16, which NumPy has not got, comes as float32."""


@runtime_checkable
class Runnable(Protocol):
    """A format whose files are models, not only weights; the export compares their answers."""

    def open_runner(self, path: Path, device: str = "cpu") -> Runner:
        """Open what `write` wrote, on `cpu` or `cuda`.

        Raises:
            ConfigError: a library, a device or the code that it needs is not here.
            ExportError: the file is not of this format, or was altered.
        """


class ExportError(PerdureError):
    """This model cannot be exported so, or an export cannot be used."""


def library(name: str, extra: str = "export") -> Any:
    """Import a library that a format needs.

    Raises:
        ConfigError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this needs {name}, which is not installed ({error}): pip install 'perdure[{extra}]'"
        ) from None


def is_true(options: Mapping[str, str], key: str) -> bool:
    """Return an option that is true or false.

    Raises:
        ConfigError: it is neither.
    """
    if options[key] not in ("true", "false"):
        raise ConfigError(f"{key}={options[key]} is neither true nor false")
    return options[key] == "true"
