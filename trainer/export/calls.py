"""How a model is called and what it answers, as tensors with names: any nest of them, flattened."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trainer.errors import ConfigError


@dataclass(frozen=True)
class Call:
    """The arguments of one call; what is no tensor in them is a constant."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    names: tuple[str, ...]
    """Of the tensors, in order: as the parameters of `forward` are called."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names."""
        found = (t for _, t in leaves((self.arguments, dict(self.keywords))))
        return dict(zip(self.names, found, strict=True))

    def filled(self, tensors: Iterator[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the same arguments and keywords with other tensors, in the order of `names`."""
        arguments, keywords = exchanged((self.arguments, dict(self.keywords)), tensors)
        return arguments, keywords

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Call":
        """Return the call with each tensor as `move` returns it."""
        arguments, keywords = self.filled(map(move, self.tensors().values()))
        return Call(arguments, keywords, self.names)

    @property
    def is_flat(self) -> bool:
        """Whether every argument is a tensor."""
        given = (*self.arguments, *self.keywords.values())
        return all(isinstance(value, Tensor) for value in given)


def call_of(model: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Call:
    """Return a call of the model, its tensors named after the parameters of `forward`.

    Raises:
        ConfigError: no argument is a tensor, or `forward` does not take these.
    """
    try:
        bound = inspect.signature(model.forward).bind(*arguments, **keywords)
    except TypeError as error:
        raise ConfigError(f"{type(model).__name__}.forward cannot be called so: {error}") from None
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    names = tuple(_unique([path for path, _ in leaves(named)]))
    if not names:
        raise ConfigError(f"{type(model).__name__}.forward is called without any tensor")
    return Call(bound.args, bound.kwargs, names)


def outputs_of(answer: Any) -> dict[str, Tensor]:
    """Return the tensors of what a model returns: `output`, `output_0` … of a tuple, or its keys.

    Raises:
        ConfigError: there is no tensor in it.
    """
    found = list(
        leaves({"output": answer} if isinstance(answer, Tensor | tuple | list) else answer)
    )
    if not found:
        raise ConfigError(
            f"the model returns a {type(answer).__name__} without tensors, which no format can "
            "hold; return a tensor, or a tuple or dict of tensors"
        )
    names = _unique([path for path, _ in found])
    return dict(zip(names, (tensor for _, tensor in found), strict=True))


Path = tuple[str, ...]


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield every tensor in tuples, lists, mappings and dataclasses, with the way to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))
    elif isinstance(value, tuple | list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, str(index)))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), (*path, field.name))


def exchanged(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return the same nest with other tensors, taken in the order of `leaves`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, Mapping):
        return {key: exchanged(inner, tensors) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        found = [exchanged(inner, tensors) for inner in value]
        if isinstance(value, list):
            return found
        return type(value)(*found) if hasattr(value, "_fields") else tuple(found)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        changed = {name: exchanged(getattr(value, name), tensors) for name in names}
        return dataclasses.replace(value, **changed)
    return value


def _unique(paths: list[Path]) -> list[str]:
    """Return short names: the last key of each way where that tells them apart, else all of it."""
    short = [path[-1] if not path[-1].isdigit() else "_".join(path[-2:]) for path in paths]
    names = short if len(set(short)) == len(short) else ["_".join(path) for path in paths]
    return [re.sub(r"\W", "_", name) for name in names]
