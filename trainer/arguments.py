"""Arguments of the commands beside `trainer.run`: places, key=value options and --flags."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer.config import ObjectStore
from trainer.errors import ConfigError, closest

_STORE = "store."


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
        elif not equals or "/" in key:
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
