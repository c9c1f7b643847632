"""Arguments, errors and exit codes of the commands other than `trainer.run`."""

import os
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

from omegaconf import OmegaConf
from yaml import YAMLError

from trainer.config.merge import merge_options
from trainer.config.schema import ObjectStore
from trainer.errors import (
    CONFIGURATION,
    DONE,
    FAILURE,
    INTERRUPTED_TWICE,
    ConfigError,
    PerdureError,
    closest,
    print_error,
    problems_text,
    version_text,
)

T = TypeVar("T")
_STORE = "store."
_HELP_WIDTH = 98


def command(
    argv: Sequence[str] | None,
    usage: str,
    do: Callable[[list[str]], int],
    *,
    may_be_empty: bool = False,
    interrupted: str = "interrupted",
) -> int:
    """Print the help or run a command; return the exit code. User errors get no traceback.

    Args:
        argv: arguments after the command's name; None: those of the process.
        usage: text of --help.
        do: function that runs the command and returns its exit code.
        may_be_empty: run without arguments; otherwise, print the help and exit with 2.
        interrupted: message after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv == ["--version"]:
            code = DONE
            print(version_text())
        elif "--help" in argv or "-h" in argv or not (argv or may_be_empty):
            code = DONE if argv else CONFIGURATION
            print(usage)
        else:
            code = do(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except PerdureError as error:
        if os.environ.get("RANK", "0") == "0":
            print_error(error)
        return error.exit_code
    except BrokenPipeError:  # the reader, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED_TWICE


@dataclass(frozen=True)
class Arguments(Generic[T]):
    """Parsed arguments of a command."""

    places: list[str]
    flags: set[str]
    options: T
    """Values of the command's schema."""
    store: ObjectStore
    """Values of the `store.*` arguments, which are those of `trainer.run`."""
    texts: dict[str, str] = field(default_factory=dict)
    """Values of further options."""


@dataclass(frozen=True)
class NoOptions:
    """Schema of a command without options."""


def parse(
    arguments: Sequence[str],
    usage: str,
    schema: type[T],
    *,
    texts: Collection[str] = (),
    flags: Collection[str] = (),
    places: Collection[int] = (1,),
) -> Arguments[T]:
    """Parse the arguments of a command.

    Args:
        arguments: arguments after the command's name.
        usage: help text, appended to error messages.
        schema: frozen dataclass of the options, whose fields are declared by `setting`.
        texts: keys of further options, which are returned as text if they are given.
        flags: valid flags, with their dashes.
        places: valid numbers of positional arguments.

    Raises:
        ConfigError: a key or flag is unknown, the number of positional arguments is wrong, or the
            value of an option has the wrong type or is out of range; with all of these values.
    """
    keys = {item.name for item in fields(schema)} | set(texts)  # type: ignore[arg-type]
    urls: list[str] = []
    given_flags: set[str] = set()
    options: dict[str, str] = {}
    store = []
    rest = iter(arguments)
    for argument in rest:
        key, equals, value = argument.partition("=")
        if argument.startswith("-"):
            if argument not in flags:
                hint = _as_option(argument, rest, keys) or closest(argument, flags)
                raise ConfigError(f"no flag {argument!r}{hint}\n{usage}")
            given_flags.add(argument)
        elif equals and key.startswith(_STORE):
            store.append(argument.removeprefix(_STORE))
        elif (
            not equals or "/" in key or os.path.exists(argument)
        ):  # names of sweep runs contain `=`
            urls.append(argument)
        elif key not in keys:
            raise ConfigError(f"no option {key!r}{closest(key, keys)}\n{usage}")
        else:
            options[key] = value
    if len(urls) not in places:
        counts = [str(count) for count in sorted(places)]
        few = " or ".join(counts) if len(counts) < 4 else f"{counts[0]} to {counts[-1]}"
        expected = few + (" path" if max(places) == 1 else " paths")
        raise ConfigError(f"{expected} needed, {len(urls)} given\n{usage}")
    further = {key: options.pop(key) for key in texts if key in options}
    return Arguments(urls, given_flags, *_typed(schema, options, store), further)


def options_text(schema: type, width: int) -> str:
    """Return the lines of a schema's options for --help, with names of `width` characters."""
    lines = []
    for item in fields(schema):
        text = item.metadata["doc"]
        if item.default not in ("", None, False):  # for these, the text has the default
            default = item.default if isinstance(item.default, str) else f"{item.default:g}"
            text += f" (default {default})"
        first = f"  {item.name:<{width}}  "
        lines += textwrap.wrap(
            text, _HELP_WIDTH, initial_indent=first, subsequent_indent=" " * len(first)
        )
    return "\n".join(lines)


def _as_option(flag: str, rest: Iterator[str], keys: Collection[str]) -> str:
    """Return a hint if an option is written as `--key value` or `--key=value`."""
    key, equals, value = flag.lstrip("-").partition("=")
    key = key.replace("-", "_")
    if key not in keys and not key.startswith(_STORE):
        return ""
    return f"; options have no dashes: {key}={value if equals else next(rest, '…')}"


def _typed(schema: type[T], options: dict[str, str], store: Sequence[str]) -> tuple[T, ObjectStore]:
    """Return options and store settings with the types of their schemas."""
    try:
        store_node: Any = OmegaConf.from_dotlist(list(store))
    except (YAMLError, ValueError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"store.{' store.'.join(store)}: {reason}") from None
    values, problems = merge_options(schema, OmegaConf.create(options))
    store_values, store_problems = merge_options(ObjectStore, store_node, _STORE)
    if problems or store_problems:
        raise ConfigError(problems_text([*problems, *store_problems], "arguments"))
    return values, store_values
