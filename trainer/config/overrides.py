"""Command-line overrides, rewritten so that all problems are reported together.

Hydra stops at the first unknown key. So a plain `key=value` becomes `++key=value`, and the strict
merge checks all of them; a choice that its group does not have is removed and reported with the
other problems.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from trainer.errors import Problem, closest

_CONFIG_DIR_FLAGS = ("--config-dir", "-cd")


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
    choices = groups([conf, *_user_folders(arguments)])
    parser = OverridesParser.create()
    prepared = Prepared([], [], [])
    flags = [a for a in arguments if not _is_override(a)]
    for argument in filter(_is_override, arguments):
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            text = f"{argument!r} cannot be parsed: {str(error).splitlines()[0]}"
            prepared.problems.append(Problem(argument.partition("=")[0], text))
            continue
        key = override.key_or_group
        if override.is_sweep_override():
            prepared.swept.append(key)
        problem = _group_problem(key, argument, choices)
        if problem is not None:
            prepared.problems.append(problem)
        elif key in choices or "/" in key or "@" in argument or key.startswith("hydra."):
            prepared.arguments.append(argument)
        else:
            plain = argument[0] not in "+~"
            prepared.arguments.append("++" + argument if plain else argument)
    # Hydra's argument parser needs all overrides in a row.
    return replace(prepared, arguments=[*flags, *prepared.arguments])


def fixed_values(arguments: Sequence[str]) -> set[tuple[str, str]]:
    """Return the values that all jobs of a sweep have, as `value_of` does."""
    parser = OverridesParser.create()
    parsed = [(a, parser.parse_override(a)) for a in arguments if _is_override(a)]
    return {
        value_of(argument)
        for argument, override in parsed
        if not (argument.startswith("~") or override.is_sweep_override())
    }


def value_of(argument: str) -> tuple[str, str]:
    """Return key and value of an override, in one form for all ways to write them."""
    override = OverridesParser.create().parse_override(argument)
    return override.key_or_group, override.get_value_element_as_str()


def _is_override(argument: str) -> bool:
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


def _user_folders(arguments: Sequence[str]) -> list[Path]:
    folders = []
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in _CONFIG_DIR_FLAGS:
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            folders.append(Path(value if equals else following))
    return [folder for folder in folders if folder.is_dir()]


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
