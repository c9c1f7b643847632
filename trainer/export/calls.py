"""Calls of a model, with the tensors of any nested arguments and outputs flattened and named."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trainer.errors import ConfigError

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """The arguments of a call; everything except tensors is constant."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    names: tuple[str, ...]
    """Tensor names, in order, after the parameters of `forward`."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        tensors = (tensor for _, tensor in leaves((self.arguments, dict(self.keywords))))
        return dict(zip(self.names, tensors, strict=True))

    def with_tensors(self, tensors: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments and keywords with other tensors, in the order of `names`."""
        nested = (self.arguments, dict(self.keywords))
        arguments, keywords = replace_tensors(nested, iter(tensors))
        return arguments, keywords

    def map(self, function: Callable[[Tensor], Tensor]) -> "Call":
        """Return the call with `function` applied to each tensor."""
        arguments, keywords = self.with_tensors(map(function, self.tensors().values()))
        return Call(arguments, keywords, self.names)


def call_of(model: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Call:
    """Return a call of the model, with tensors named after the parameters of `forward`.

    Raises:
        ConfigError: no argument is a tensor, or `forward` does not accept these arguments.
    """
    try:
        bound = inspect.signature(model.forward).bind(*arguments, **keywords)
    except TypeError as error:
        raise ConfigError(
            f"{type(model).__name__}.forward does not accept these arguments: {error}"
        ) from None
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    names = tuple(_unique([path for path, _ in leaves(named)]))
    if not names:
        raise ConfigError(f"{type(model).__name__}.forward is called without a tensor argument")
    return Call(bound.args, bound.kwargs, names)


def outputs_of(result: Any) -> dict[str, Tensor]:
    """Return the tensors of a model's result: `output`, `output_0` … for tuples, or dict keys.

    Raises:
        ConfigError: it has no tensor.
    """
    is_unnamed = isinstance(result, Tensor | tuple | list)
    outputs = list(leaves({"output": result} if is_unnamed else result))
    if not outputs:
        raise ConfigError(
            f"the model returns a {type(result).__name__} without tensors, which cannot be "
            "exported; return a tensor, or a tuple or dict of tensors"
        )
    names = _unique([path for path, _ in outputs])
    return dict(zip(names, (tensor for _, tensor in outputs), strict=True))


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Tensor]]:
    """Yield every tensor in nested tuples, lists, mappings and dataclasses, with its key path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, (*path, str(key)))
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, str(index)))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), (*path, field.name))


def replace_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return the same nested value with other tensors, in the order of `leaves`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, Mapping):
        return {key: replace_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [replace_tensors(item, tensors) for item in value]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        changes = {name: replace_tensors(getattr(value, name), tensors) for name in names}
        return dataclasses.replace(value, **changes)
    return value


def _unique(paths: list[KeyPath]) -> list[str]:
    """Return the last key of each path if these are unique, or else all keys joined."""
    short = [path[-1] if not path[-1].isdigit() else "_".join(path[-2:]) for path in paths]
    names = short if len(set(short)) == len(short) else ["_".join(path) for path in paths]
    return [re.sub(r"\W", "_", name) for name in names]
