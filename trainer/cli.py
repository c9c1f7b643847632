"""The commands beside `trainer.run`: their places, key=value options, --flags, and their ends."""

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
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
    """Show the help, or do what was typed; return the exit code. What we expect has no traceback.

    Args:
        argv: what was typed after the command's name; None: the process's own arguments.
        usage: the help.
        do: does it, and returns the exit code.
        may_be_empty: whether it takes no arguments too; otherwise, the help is shown for none.
        interrupted: said after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if "--help" in argv or "-h" in argv or not (argv or may_be_empty):
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
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED_TWICE


@dataclass(frozen=True)
class Arguments:
    """What was typed, sorted."""

    places: list[str]
    options: dict[str, str]
    flags: set[str]
    store: ObjectStore
    """From `store.endpoint_url=…` and the like, as `trainer.run` has them."""


def parse(
    arguments: Sequence[str],
    usage: str,
    *,
    options: Mapping[str, str],
    flags: Collection[str] = (),
    places: Collection[int] = (1,),
) -> Arguments:
    """Sort the arguments of a command.

    Args:
        arguments: as typed.
        usage: shown with every error.
        options: known keys, with their defaults.
        flags: known flags, with their dashes.
        places: how many other arguments there may be.

    Raises:
        ConfigError: a key or flag is not known, or too many or few places were given.
    """
    found = Arguments([], dict(options), set(), ObjectStore())
    store = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.startswith("-"):
            if argument not in flags:
                raise ConfigError(
                    f"there is no flag {argument!r}{closest(argument, flags)}\n{usage}"
                )
            found.flags.add(argument)
        elif equals and key.startswith(_STORE):
            store.append(argument.removeprefix(_STORE))
        elif not equals or "/" in key or os.path.exists(argument):  # a sweep's runs have `=`
            found.places.append(argument)
        elif key not in options:
            raise ConfigError(f"there is no option {key!r}{closest(key, options)}\n{usage}")
        else:
            found.options[key] = value
    if len(found.places) not in places:
        counts = [str(count) for count in sorted(places)]
        few = " or ".join(counts) if len(counts) < 4 else f"{counts[0]} to {counts[-1]}"
        wanted = few + (" path" if max(places) == 1 else " paths")
        raise ConfigError(f"{wanted} needed, {len(found.places)} given\n{usage}")
    return Arguments(found.places, found.options, found.flags, _object_store(store))


def _object_store(settings: Sequence[str]) -> ObjectStore:
    if not settings:
        return ObjectStore()
    schema = OmegaConf.structured(ObjectStore)
    OmegaConf.set_readonly(schema, False)  # a frozen dataclass makes its own node read-only
    try:
        merged = OmegaConf.merge(schema, OmegaConf.from_dotlist(list(settings)))
        found: ObjectStore = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except (OmegaConfBaseException, YAMLError, ValueError, LookupError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"store.{' store.'.join(settings)}: {text}") from None
    return found
