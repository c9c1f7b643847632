"""What `_target_` names: found, judged by its signature before anything runs, and called."""

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, PerdureError, Problem, closest

_HYDRA_WORDS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")


def check_target(node: Any, key: str, provided: int = 0) -> list[Problem]:
    """Return the problems of one `{_target_: …, argument: …}` node and of those inside it.

    Args:
        node: the node.
        key: its full key, for the messages.
        provided: positional arguments that we pass ourselves, such as an optimizer's parameters.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        text = "has no _target_: the dotted name of a class or function that makes it"
        return [Problem(key, text)]
    target, problem = find(str(node["_target_"]))
    if target is None:
        return [Problem(f"{key}._target_", problem)]
    arguments = {name: value for name, value in node.items() if name not in _HYDRA_WORDS}
    listed = node.get("_args_")
    problems = []
    for name, value in {**arguments, "_args_": listed}.items():
        problems += _check_nested(value, f"{key}.{name}")
    provided += len(listed) if isinstance(listed, list) else 0
    found = _check_arguments(target, str(node["_target_"]), arguments, key, provided)
    if node.get("_partial_"):  # what is missing comes with the call
        found = [problem for problem in found if problem.key.rpartition(".")[2] in arguments]
    return problems + found


def _check_nested(value: Any, key: str) -> list[Problem]:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return check_target(value, key)
        return [p for name, item in value.items() for p in _check_nested(item, f"{key}.{name}")]
    if isinstance(value, list):
        return [p for i, item in enumerate(value) for p in _check_nested(item, f"{key}[{i}]")]
    return []


def find(path: str) -> tuple[Any, str]:
    """Return (object, "") or (None, what is wrong)."""
    parts = path.split(".")
    if not all(parts):
        return None, f"{path!r} is not a dotted name"
    found: Any = None
    for count in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:count])
        try:
            found = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and (module_name + ".").startswith(error.name + "."):
                continue  # the module itself is missing, not something that it imports
            return None, f"{module_name} cannot be imported: {error}"
        except (Exception, SystemExit) as error:  # a user's module may fail in any way
            return None, f"{module_name} cannot be imported: {type(error).__name__}: {error}"
        for name in parts[count:]:
            if not hasattr(found, name) and name in _submodules(found):
                return None, f"{path} is a module, not a class or function"
            if not hasattr(found, name):
                missing = f"there is no {name!r} in {module_name}{closest(name, _names(found))}"
                return None, f"{path}: {missing}{_shadowed(module_name)}"
            found = getattr(found, name)
        if not callable(found):
            return None, f"{path} is a {type(found).__name__}, not a class or function"
        return found, ""
    hint = "" if len(parts) > 1 else "; give the dotted name of a class or function"
    return None, f"{path}: there is no module {parts[0]!r}{hint}"


def _names(found: Any) -> list[str]:
    return [name for name in [*dir(found), *_submodules(found)] if not name.startswith("_")]


def _submodules(found: Any) -> list[str]:
    """Return the names of a package's modules, also of those that nobody has imported."""
    return [module.name for module in pkgutil.iter_modules(getattr(found, "__path__", []))]


def _shadowed(name: str) -> str:
    """Say where `models` comes from, when a folder of the user's hides the one of this project."""
    ours = Path(__file__).resolve().parents[2] / name
    module = importlib.import_module(name)
    folders = [Path(folder).resolve() for folder in getattr(module, "__path__", [])]
    if name != "models" or ours in folders:
        return ""
    return (
        f"; 'models' is {folders[0] if folders else module} here, which hides this project's own: "
        "rename that folder, or start from another directory"
    )


def _check_arguments(
    target: Any, path: str, arguments: Mapping[str, Any], key: str, provided: int
) -> list[Problem]:
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return []  # a builtin without a signature judges its arguments itself
    parameters = signature.parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if is_dataclass(target) and hasattr(vars(target).get("__init__"), "__wrapped__"):
        takes_any = True  # transformers' configurations take more than their fields
    positional = [
        name
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    given = set(positional[:provided])
    valid = [
        n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    valid = [name for name in valid if name not in given]
    problems = []
    for name, value in arguments.items():
        if name not in valid:
            if not takes_any:
                text = f"{path} has no argument {name!r}{closest(name, valid)}"
                problems.append(Problem(f"{key}.{name}", text))
        elif value is None and parameters[name].default is None:
            continue
        elif not accepts(_annotation(target, parameters[name]), value):
            text = f"{value!r} is not {_shown(_annotation(target, parameters[name]))}"
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
    except Exception:  # an annotation may name anything, also what only a type checker imports
        return Any


def _shown(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


_SIMPLE = (int, float, bool, str, type(None))


def accepts(annotation: Any, value: Any) -> bool:
    """Return whether a value from YAML can be meant by an annotation; in doubt, yes."""
    if annotation in (Any, inspect.Parameter.empty) or isinstance(value, Mapping):
        return True
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if isinstance(value, str) and _numbers_only(inner):
            return False
        return any(accepts(item, value) for item in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (list, Sequence, set, frozenset):
        return isinstance(value, list) and all(accepts(item, v) for item in inner for v in value)
    if origin is tuple:
        if not (isinstance(value, list) and inner):
            return isinstance(value, list)
        items = [inner[0]] * len(value) if inner[1:] == (Ellipsis,) else list(inner)
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
    """Whether a union is of numbers, and of tensors at most: no text is meant by it."""
    names = {getattr(member, "__name__", "") for member in members}
    return bool(names & {"int", "float"}) and names <= {
        "int",
        "float",
        "bool",
        "NoneType",
        "Tensor",
    }


def make(node: Mapping[str, Any], key: str, *provided: Any) -> Any:
    """Call a target. What it says about its arguments becomes a ConfigError; a bug stays one."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(dict(node), *provided, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, PerdureError):
            raise cause from None
        if isinstance(cause, ValueError):
            raise ConfigError(f"{key}: {node['_target_']} refused: {cause}") from cause
        if cause is not None:
            raise cause from None
        raise ConfigError(f"{key}: {error}") from error
