"""Targets: resolve a `_target_`, check its arguments against its signature, and call it."""

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, PerdureError, Problem, closest

_HYDRA_WORDS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")


def check_target(
    node: Any, key: str, provided: int = 0, named: Collection[str] = ()
) -> list[Problem]:
    """Return the problems of a `{_target_: …, argument: …}` node and of its nested nodes.

    Args:
        node: the node.
        key: its full key, for the messages.
        provided: number of positional arguments that the caller adds, such as an optimizer's
            parameters.
        named: arguments that the caller adds by name, also in nested nodes, where they exist.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        text = "has no _target_, the dotted name of a class or function"
        return [Problem(key, text)]
    target, problem = find(str(node["_target_"]))
    if target is None:
        return [Problem(f"{key}._target_", problem)]
    arguments = {name: value for name, value in node.items() if name not in _HYDRA_WORDS}
    listed = node.get("_args_")
    problems = []
    for name, value in {**arguments, "_args_": listed}.items():
        problems += _check_nested(value, f"{key}.{name}", named)
    provided += len(listed) if isinstance(listed, list) else 0
    direct = _check_arguments(target, str(node["_target_"]), arguments, key, provided, named)
    if node.get("_partial_"):  # the call supplies missing arguments
        direct = [problem for problem in direct if problem.key.rpartition(".")[2] in arguments]
    return problems + direct


def _check_nested(value: Any, key: str, named: Collection[str]) -> list[Problem]:
    items: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        if "_target_" in value:
            return check_target(value, key, named=named)
        items = [(f"{key}.{name}", item) for name, item in value.items()]
    elif isinstance(value, list):
        items = [(f"{key}[{index}]", item) for index, item in enumerate(value)]
    return [problem for name, item in items for problem in _check_nested(item, name, named)]


def takes(path: Any, argument: str) -> bool:
    """Return whether the target with this dotted name has an argument of this name."""
    try:
        return argument in inspect.signature(find(str(path))[0]).parameters
    except (TypeError, ValueError):  # no such target, or a builtin without a signature
        return False


def find(path: str) -> tuple[Any, str]:
    """Import a dotted name; return (object, "") or (None, error message)."""
    parts = path.split(".")
    if not all(parts):
        return None, f"{path!r} is not a dotted name"
    if text := _hidden(parts) if len(parts) > 1 else "":
        return None, text
    value: Any = None
    for count in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:count])
        try:
            value = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and (module_name + ".").startswith(error.name + "."):
                continue  # the module itself is missing, not something that it imports
            return None, f"{module_name} cannot be imported: {error}"
        except (Exception, SystemExit) as error:  # a user's module may fail in any way
            return None, f"{module_name} cannot be imported: {type(error).__name__}: {error}"
        for name in parts[count:]:
            if not hasattr(value, name) and name in _submodules(value):
                return None, f"{path} is a module, not a class or function"
            if not hasattr(value, name):
                missing = f"{module_name} has no {name!r}{closest(name, _names(value))}"
                return None, f"{path}: {missing}{_shadowed(module_name)}"
            value = getattr(value, name)
        if not callable(value):
            return None, f"{path} is a {type(value).__name__}, not a class or function"
        return value, ""
    hint = "" if len(parts) > 1 else "; give the dotted name of a class or function"
    return None, f"{path}: no such module {parts[0]!r}{hint}"


def _names(value: Any) -> list[str]:
    return [name for name in [*dir(value), *_submodules(value)] if not name.startswith("_")]


def _submodules(value: Any) -> list[str]:
    """Return the names of all modules of a package, imported or not."""
    return [module.name for module in pkgutil.iter_modules(getattr(value, "__path__", []))]


def _shadowed(name: str) -> str:
    """Return a hint if another `models` package hides Perdure's."""
    shipped = Path(__file__).resolve().parents[2] / name
    module = importlib.import_module(name)
    folders = [Path(folder).resolve() for folder in getattr(module, "__path__", [])]
    if name != "models" or shipped in folders:
        return ""
    return (
        f"; 'models' is imported from {folders[0] if folders else module}, which hides Perdure's: "
        "rename that folder, or start from another directory"
    )


def _hidden(parts: Sequence[str]) -> str:
    """Return an error if Perdure's package hides the user's module with this dotted name.

    Python prefers a package with an `__init__.py` anywhere on the path to a folder without one.
    """
    folder = Path.cwd() / parts[0]
    is_shipped = folder.resolve() == Path(__file__).resolve().parents[2] / parts[0]
    if parts[0] not in ("models", "trainer") or is_shipped or (folder / "__init__.py").exists():
        return ""
    for file in (folder / f"{parts[1]}.py", folder / parts[1] / "__init__.py"):
        if file.is_file():
            return (
                f"{'.'.join(parts)}: Perdure's package {parts[0]!r} hides {file}; rename the "
                f"folder {folder.name}, and the _target_ with it"
            )
    return ""


def _check_arguments(
    target: Any,
    path: str,
    arguments: Mapping[str, Any],
    key: str,
    provided: int,
    named: Collection[str],
) -> list[Problem]:
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return []  # a builtin without a signature checks its arguments itself
    parameters = signature.parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if is_dataclass(target) and hasattr(vars(target).get("__init__"), "__wrapped__"):
        takes_any = True  # transformers' configurations take more than their fields
    positional = [
        name
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    passed = {*positional[:provided], *named}
    valid = [
        n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    valid = [name for name in valid if name not in passed]
    problems = []
    for name, value in arguments.items():
        if name not in valid:
            if not takes_any:
                text = f"{path} has no argument {name!r}{closest(name, valid)}"
                problems.append(Problem(f"{key}.{name}", text))
        elif value is None and parameters[name].default is None:
            continue
        elif not accepts(_annotation(target, parameters[name]), value):
            text = f"{value!r} is not {_type_text(_annotation(target, parameters[name]))}"
            problems.append(Problem(f"{key}.{name}", text))
    for name in valid:
        parameter = parameters[name]
        if parameter.default is parameter.empty and name not in arguments:
            problems.append(Problem(f"{key}.{name}", f"{path} needs this argument"))
    return problems


def _annotation(target: Any, parameter: inspect.Parameter) -> Any:
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function).get(parameter.name, Any)
    except Exception:  # it may refer to names that only a type checker imports
        return Any


def _type_text(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def accepts(annotation: Any, value: Any) -> bool:
    """Return whether a value from YAML may fit an annotation; True if that cannot be decided."""
    if annotation in (Any, inspect.Parameter.empty) or isinstance(value, Mapping):
        return True
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if isinstance(value, str) and _numbers_only(members):
            return False
        return any(accepts(item, value) for item in members)
    if origin is typing.Literal:
        return value in members
    if origin in (list, Sequence, set, frozenset):
        return isinstance(value, list) and all(accepts(item, v) for item in members for v in value)
    if origin is tuple:
        if not (isinstance(value, list) and members):
            return isinstance(value, list)
        items = [members[0]] * len(value) if members[1:] == (Ellipsis,) else list(members)
        return len(items) == len(value) and all(map(accepts, items, value))
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (bool, str):
        return isinstance(value, annotation)
    if annotation in (None, type(None)):
        return value is None
    return True


def _numbers_only(members: Sequence[Any]) -> bool:
    """Return whether a union holds only numbers, None and tensors, so that a string cannot fit."""
    names = {getattr(member, "__name__", "") for member in members}
    fitting = {"int", "float", "bool", "NoneType", "Tensor"}
    return bool(names & {"int", "float"}) and names <= fitting


def make(node: Mapping[str, Any], key: str, *provided: Any, **named: Any) -> Any:
    """Call a target; a ValueError about its arguments becomes a ConfigError.

    Args:
        node: the node.
        key: its full key, for the messages.
        provided: positional arguments, passed unchanged.
        named: arguments by name: objects, or lists of objects.

    Raises:
        ConfigError: the target rejected its arguments. Any other exception is passed on.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(dict(node), *provided, _convert_="all", **named)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, PerdureError):
            raise cause from None
        if isinstance(cause, ValueError):
            raise ConfigError(
                f"{key}: {node['_target_']} rejected its arguments: {cause}"
            ) from cause
        if cause is not None:
            raise cause from None
        raise ConfigError(f"{key}: {error}") from error
