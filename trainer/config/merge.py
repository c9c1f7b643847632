"""Strict merge of a composed configuration onto the schema, with all problems at once."""

from dataclasses import is_dataclass
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from trainer.config.schema import Run
from trainer.config.validate import check_ranges, validate
from trainer.core.locations import normalized
from trainer.core.nested import dotted, leaves
from trainer.errors import Problem, closest

T = TypeVar("T")
_LOCATIONS = ("run_dir", "checkpoint.mirror", "resume", "init.weights")
"""Settings that are brought to the normal form of paths and URLs."""
_NO_SUCH_KEY = "no such key"


def merge(composed: DictConfig) -> tuple[Run, list[Problem]]:
    """Merge a composed configuration onto the schema; neither starts nor changes anything.

    Returns:
        The frozen configuration, and every unknown key, wrong type, unresolvable interpolation
        and value out of range. With problems, the configuration serves only to detect more of
        them: values that could not be merged have their defaults. Values inside open groups are
        validated by `build.check`.
    """
    node = writable(Run)
    problems = [_with_full_key(p, composed) for p in _merge_node(Run, composed, node, "")]
    for key in ("name", "run_dir"):
        if OmegaConf.is_missing(node, key):
            if key not in {problem.key for problem in problems}:
                problems.append(Problem(key, "is not set; give it a value"))
            node[key] = "unnamed"
    run: Run = OmegaConf.to_object(node)  # type: ignore[assignment]
    reported = {problem.key for problem in problems}
    reported |= {key.partition(".")[0] for key in reported}  # an open group that was not merged
    return run, problems + [problem for problem in validate(run) if problem.key not in reported]


def merge_options(cls: type[T], values: DictConfig, prefix: str = "") -> tuple[T, list[Problem]]:
    """Merge the options of a command onto its schema, a frozen dataclass, as `merge` does.

    Args:
        cls: dataclass of the options, whose fields are declared by `setting`.
        values: values of options, also as text: "2" is a number if the field is one.
        prefix: text before the keys in problems.
    """
    node = writable(cls)
    problems = _merge_node(cls, values, node, prefix)
    options: T = OmegaConf.to_object(node)  # type: ignore[assignment]
    return options, problems + check_ranges(options, prefix)


def writable(cls: type) -> DictConfig:
    """Return a node with the defaults of a frozen dataclass, which OmegaConf makes read-only."""
    node: DictConfig = OmegaConf.structured(cls)
    OmegaConf.set_readonly(node, False)
    return node


def assign(node: DictConfig, key: str, value: Any, full: str) -> list[Problem]:
    """Set `node[key]`; return the problem if the value's type does not fit.

    Args:
        node: a node of a dataclass that has the field `key`.
        key: name of the field.
        value: plain value to convert and set.
        full: full dotted key, for the message.
    """
    try:
        node[key] = value
    except OmegaConfBaseException as error:
        return [Problem(full, f"{value!r} does not fit: {_first_line(error)}")]
    return []


def _merge_node(cls: type, node: DictConfig, target: DictConfig, prefix: str) -> list[Problem]:
    OmegaConf.set_readonly(target, False)
    hints = get_type_hints(cls)
    problems = []
    for key in map(str, node):
        full = prefix + key
        if key not in hints:
            problems.append(Problem(full, f"{_NO_SUCH_KEY}{closest(key, hints)}"))
            continue
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            problems.append(Problem(full, _without_value(error)))
            continue
        if is_dataclass(hints[key]) and isinstance(value, DictConfig):
            nested_cls: type = hints[key]
            problems += _merge_node(nested_cls, value, target[key], full + ".")
            continue
        if isinstance(value, (DictConfig, ListConfig)):
            if unresolved := _unresolved(value, full):
                problems += unresolved
                continue
            value = OmegaConf.to_container(value, resolve=True)
        if escaped := _escaped(value, full):
            problems += escaped
            continue
        if hints[key] == dict[str, Any] and value is None:
            value = {}
        if full in _LOCATIONS and isinstance(value, str):
            try:
                value = normalized(value)
            except ValueError as error:
                problems.append(Problem(full, str(error)))
                continue
        problems += assign(target, key, value, full)
    return problems


def _with_full_key(problem: Problem, composed: DictConfig) -> Problem:
    """Suggest the full key for a key that exists in another place, such as `lr`."""
    if not problem.text.startswith(_NO_SUCH_KEY):
        return problem
    plain: Any = OmegaConf.to_container(composed, resolve=False)
    fields: Any = OmegaConf.to_container(OmegaConf.structured(Run))
    paths = [*leaves(fields), *((path, leaf) for path, leaf in leaves(plain) if path[0] in fields)]
    last = problem.key.rpartition(".")[2]
    keys = dict.fromkeys(dotted(path) for path, _ in paths if path[-1] == last)
    keys.pop(problem.key, None)
    names = " or ".join(f"'{key}'" for key in list(keys)[:3])
    return Problem(problem.key, f"{_NO_SUCH_KEY} (did you mean {names}?)") if keys else problem


def _escaped(value: Any, full: str) -> list[Problem]:
    """Return texts that still look like an interpolation after all of them were resolved.

    The next program that reads the configuration would resolve them; in a configuration from a
    checkpoint, that could call any resolver.
    """
    text = "contains ${ after interpolation and would be resolved a second time; remove the ${"
    return [
        Problem(dotted((full, *path)), text)
        for path, leaf in leaves(value)
        if any(isinstance(part, str) and "${" in part for part in (*path, leaf))
    ]


def _unresolved(node: DictConfig | ListConfig, prefix: str) -> list[Problem]:
    """Return the problems of values without a value inside an open group or a list."""
    keys: list[tuple[Any, str]] = (
        [(index, f"[{index}]") for index in range(len(node))]
        if isinstance(node, ListConfig)
        else [(key, f".{key!s}") for key in node]
    )
    problems = []
    for key, suffix in keys:
        full = prefix + suffix
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            problems.append(Problem(full, _without_value(error)))
            continue
        if isinstance(value, (DictConfig, ListConfig)):
            problems += _unresolved(value, full)
    return problems


def _without_value(error: OmegaConfBaseException) -> str:
    if isinstance(error, MissingMandatoryValue):
        return "is not set; give it a value"
    return f"cannot be resolved: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
