"""Command-line overrides, rewritten so that all problems are reported together.

Hydra stops at the first unknown key. So a plain `key=value` becomes `++key=value`, and the strict
merge checks all of them; a choice that its group does not have is removed and reported with the
other problems.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from trainer.config.schema import Run
from trainer.config.search_path import search_path
from trainer.errors import Problem, closest


@dataclass(frozen=True)
class Prepared:
    """Arguments for Hydra, and the problems of the removed ones."""

    arguments: list[str]
    problems: list[Problem]
    swept: list[str]
    """Keys that a multirun sweeps over."""


def groups(folders: Sequence[Path]) -> dict[str, set[str]]:
    """Return {group: choices} over all configuration folders."""
    choices: dict[str, set[str]] = {}
    for folder in folders:
        for path in folder.rglob("*.yaml"):
            group = path.parent.relative_to(folder).as_posix()
            if group != ".":
                choices.setdefault(group, set()).add(path.stem)
    return choices


def prepare(arguments: Sequence[str], conf: Path) -> Prepared:
    """Rewrite the overrides among `arguments`; keep Hydra's flags unchanged."""
    choices = groups([conf, *search_path(arguments)])
    parser = OverridesParser.create()
    prepared = Prepared([], [], [])
    flags = [a for a in arguments if not _is_override(a)]
    for argument in filter(_is_override, arguments):
        argument, override, problem = _parse(parser, argument)
        if override is None:
            prepared.problems.append(problem)
            continue
        key = override.key_or_group
        if override.is_sweep_override():
            prepared.swept.append(key)
        wrong_choice = _group_problem(key, argument, choices)
        if wrong_choice is not None:
            prepared.problems.append(wrong_choice)
        elif key in choices or "/" in key or "@" in argument or key.startswith("hydra."):
            prepared.arguments.append(argument)
        else:
            plain = argument[0] not in "+~"
            prepared.arguments.append("++" + argument if plain else argument)
    # Hydra's argument parser needs all overrides in a row.
    return replace(prepared, arguments=[*flags, *prepared.arguments])


def _parse(parser: OverridesParser, argument: str) -> tuple[str, Override | None, Problem]:
    """Parse an override; quote a value that Hydra's grammar excludes if it is plainly a text.

    Returns:
        The override as text and parsed, or None and the problem.
    """
    key, _, value = argument.partition("=")
    problem = Problem(key.lstrip("+~"), "")
    try:
        return argument, parser.parse_override(argument), problem
    except HydraException as error:
        first_line = str(error).splitlines()[0]
    text = f"{argument!r} cannot be parsed: {first_line}; to give it as text: {quoted(key, value)}"
    if argument.startswith("~") or not value or _IS_STRUCTURED.match(value):
        return argument, None, replace(problem, text=text)
    plain = f"{key}={_literal(value, chr(39))}"
    try:
        return plain, parser.parse_override(plain), problem
    except HydraException:  # the key is not valid either
        return argument, None, replace(problem, text=text)


_IS_STRUCTURED = re.compile(r"""\s*[\[{'"]|\s*\w+\(.*\)\s*$|.*,""", re.DOTALL)
"""Values that may be meant as a list, a mapping, a quoted text, a function or a sweep."""


def quoted(key: str, value: str) -> str:
    """Return the override `key=value`, with its value as text, in the quotes that a shell needs."""
    if re.search(r"""['"$`!\\]""", value):
        return shlex.quote(f"{key}={_literal(value, chr(34))}")
    return f"\"{key}='{value}'\""


def _literal(value: str, quote: str) -> str:
    """Return a text in quotes, in Hydra's grammar."""
    escaped = re.sub(rf"(\\*)({quote}|$)", lambda m: 2 * m[1] + (m[2] and f"\\{quote}"), value)
    return f"{quote}{escaped}{quote}"


def need_no_target(arguments: Sequence[str]) -> bool:
    """Return whether the strict merge finds all problems of these arguments.

    True for choices of the shipped groups and for settings whose validation neither looks up a
    `_target_` nor a file. False for flags, since they can add groups and configurations.
    """
    return all(map(_needs_no_target, arguments))


_OPEN = {name for name, hint in get_type_hints(Run).items() if hint == dict[str, Any]}
_CHECKED_LATER = _OPEN | {"init", "preemption", "checkpoint", "hydra"}
"""Sections of which `build.check` validates more than the merge."""


def _needs_no_target(argument: str) -> bool:
    key, _, value = argument.partition("=")
    section = re.split(r"[./@]", key.lstrip("+"))[0]
    if not _is_override(argument) or argument.startswith("~"):
        return False
    is_choice = key == section and re.fullmatch(r"[\w-]+", value) is not None
    return is_choice or section not in _CHECKED_LATER


def fixed_values(arguments: Sequence[str]) -> set[tuple[str, str]]:
    """Return the values that all jobs of a sweep have, as `value_of` does.

    A key that is also swept has none.
    """
    parser = OverridesParser.create()
    parsed = [(a, parser.parse_override(a)) for a in arguments if _is_override(a)]
    swept = {override.key_or_group for _, override in parsed if override.is_sweep_override()}
    return {
        value_of(argument)
        for argument, override in parsed
        if not argument.startswith("~") and override.key_or_group not in swept
    }


def value_of(argument: str) -> tuple[str, str]:
    """Return key and value of an override, in one form for all ways to write them."""
    override = OverridesParser.create().parse_override(argument)
    return override.key_or_group, override.get_value_element_as_str()


def _is_override(argument: str) -> bool:
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


def _group_problem(key: str, argument: str, choices: Mapping[str, set[str]]) -> Problem | None:
    if key not in choices or argument.startswith("~") or key.startswith("hydra/"):
        return None
    text = argument.partition("=")[2]
    if text.startswith(("{", "[", "choice(", "glob(")) or text in ("null", ""):
        return None
    for choice in text.split(","):
        name = choice.strip().removesuffix(".yaml")
        if name not in choices[key]:
            return Problem(key, f"no such choice: {key}={name}{closest(name, choices[key])}")
    return None
