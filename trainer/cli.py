"""Arguments, errors and exit codes of the commands other than `trainer.run`."""

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

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
    version_text,
)

_STORE = "store."


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
class Arguments:
    """Parsed arguments of a command."""

    places: list[str]
    options: dict[str, str]
    flags: set[str]
    store: ObjectStore
    """Values of the `store.*` arguments, which are those of `trainer.run`."""


def parse(
    arguments: Sequence[str],
    usage: str,
    *,
    options: Mapping[str, str],
    flags: Collection[str] = (),
    places: Collection[int] = (1,),
) -> Arguments:
    """Parse the arguments of a command.

    Args:
        arguments: arguments after the command's name.
        usage: help text, appended to error messages.
        options: valid keys, with their defaults.
        flags: valid flags, with their dashes.
        places: valid numbers of positional arguments.

    Raises:
        ConfigError: a key or flag is unknown, or the number of positional arguments is wrong.
    """
    parsed = Arguments([], dict(options), set(), ObjectStore())
    store = []
    rest = iter(arguments)
    for argument in rest:
        key, equals, value = argument.partition("=")
        if argument.startswith("-"):
            if argument not in flags:
                hint = _as_option(argument, rest, options) or closest(argument, flags)
                raise ConfigError(f"no flag {argument!r}{hint}\n{usage}")
            parsed.flags.add(argument)
        elif equals and key.startswith(_STORE):
            store.append(argument.removeprefix(_STORE))
        elif (
            not equals or "/" in key or os.path.exists(argument)
        ):  # names of sweep runs contain `=`
            parsed.places.append(argument)
        elif key not in options:
            raise ConfigError(f"no option {key!r}{closest(key, options)}\n{usage}")
        else:
            parsed.options[key] = value
    if len(parsed.places) not in places:
        counts = [str(count) for count in sorted(places)]
        few = " or ".join(counts) if len(counts) < 4 else f"{counts[0]} to {counts[-1]}"
        expected = few + (" path" if max(places) == 1 else " paths")
        raise ConfigError(f"{expected} needed, {len(parsed.places)} given\n{usage}")
    return Arguments(parsed.places, parsed.options, parsed.flags, _object_store(store))


def _as_option(flag: str, rest: Iterator[str], options: Mapping[str, str]) -> str:
    """Return a hint if an option is written as `--key value` or `--key=value`."""
    key, equals, value = flag.lstrip("-").partition("=")
    key = key.replace("-", "_")
    if key not in options and not key.startswith(_STORE):
        return ""
    return f"; options have no dashes: {key}={value if equals else next(rest, '…')}"


def _object_store(settings: Sequence[str]) -> ObjectStore:
    if not settings:
        return ObjectStore()
    schema = OmegaConf.structured(ObjectStore)
    OmegaConf.set_readonly(schema, False)  # a frozen dataclass makes its own node read-only
    try:
        merged = OmegaConf.merge(schema, OmegaConf.from_dotlist(list(settings)))
        merged_store: ObjectStore = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except (OmegaConfBaseException, YAMLError, ValueError, LookupError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"store.{' store.'.join(settings)}: {text}") from None
    return merged_store
