"""Frozen parameters, optimizer groups and phases, selected by name patterns."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from trainer.errors import ConfigError, closest


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze the parameters that match, in place.

    Args:
        model: the plain module.
        patterns: shell patterns for full parameter names, such as `body.*`.

    Returns:
        One line per pattern with its matches.

    Raises:
        ConfigError: a pattern matches nothing, or no trainable parameter remains.
    """
    lines = []
    for pattern in patterns:
        matches = _matching(model, pattern, "trainer.freeze")
        for parameter in matches.values():
            parameter.requires_grad_(False)
        lines.append(_line("frozen", pattern, matches))
    if patterns and not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            f"trainer.freeze={list(patterns)} freezes every parameter; nothing can be trained"
        )
    return lines


def check_step(optimizer: Any) -> str:
    """Return the problem of an optimizer class whose `step` has required arguments; "" if none.

    Args:
        optimizer: the class; a function or None is not checked.
    """
    step = getattr(optimizer, "step", None)
    arguments = list(inspect.signature(step).parameters.values())[1:] if step else []
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needs = [a.name for a in arguments if a.default is a.empty and a.kind not in variable]
    if not needs:
        return ""
    return (
        f"{optimizer.__name__}.step needs the argument {needs[0]!r}, but the gradients of a step "
        "are computed once, before it; use an optimizer whose step needs none"
    )


def groups(
    model: nn.Module, rules: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Divide the trainable parameters into optimizer groups.

    Args:
        model: the plain module, after `freeze`.
        rules: groups with `names`, a list of patterns, and optimizer settings for the matches,
            such as `weight_decay` or `lr`. A parameter belongs to the first rule that matches it.

    Returns:
        The groups, parameters without a rule first, all in the model's order; and one line per
        pattern with its matches.

    Raises:
        ConfigError: every match of a pattern is frozen or belongs to an earlier rule.
    """
    unassigned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    divided, lines = [], []
    for index, rule in enumerate(rules):
        settings = {key: value for key, value in rule.items() if key != "names"}
        label = ", ".join(f"{key}={value}" for key, value in settings.items())
        members: dict[str, nn.Parameter] = {}
        for pattern in rule["names"]:
            key = f"optimizer.groups[{index}].names"
            matches = {n: p for n, p in _matching(model, pattern, key).items() if n in unassigned}
            if not matches:
                raise ConfigError(
                    f"{key}: every parameter that matches {pattern!r} is frozen or belongs to an "
                    "earlier pattern; remove the pattern, or move it to the front"
                )
            members |= matches
            unassigned = {name: p for name, p in unassigned.items() if name not in matches}
            lines.append(_line(label, pattern, matches))
        ids = {id(parameter) for parameter in members.values()}
        divided.append({"params": [p for p in model.parameters() if id(p) in ids], **settings})
    rest = [{"params": list(unassigned.values())}] if unassigned or not divided else []
    return rest + divided, lines


def phases(
    model: nn.Module, patterns: Mapping[str, str | Sequence[str]]
) -> tuple[dict[str, list[str]], list[str]]:
    """Divide the trainable parameters among the phases of a step.

    Args:
        model: the plain module, after `freeze`.
        patterns: name patterns by phase.

    Returns:
        Parameter names by phase, in the model's order; and one line per pattern with its matches.

    Raises:
        ConfigError: a pattern matches nothing, a phase has no trainable parameter, or a trainable
            parameter is not in exactly one phase.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    owner: dict[str, str] = {}
    lines = []
    for phase, listed in patterns.items():
        for pattern in [listed] if isinstance(listed, str) else listed:
            matches = _matching(model, pattern, f"phase {phase!r} of the task")
            for name in matches:
                if owner.setdefault(name, phase) != phase:
                    raise ConfigError(
                        f"parameter {name!r} belongs to two phases of the task, {owner[name]!r} "
                        f"and {phase!r}; change their patterns so that only one matches it"
                    )
            lines.append(_line(f"phase {phase}", pattern, matches))
    missing = [name for name in trained if name not in owner]
    if missing:
        raise ConfigError(
            f"parameter {missing[0]!r} belongs to no phase of the task ({', '.join(patterns)}), so "
            "it would never be trained; add a pattern that matches it, or freeze it "
            "(trainer.freeze)"
        )
    divided = {phase: [n for n in trained if owner[n] == phase] for phase in patterns}
    idle = next((phase for phase, names in divided.items() if not names), None)
    if idle is not None:
        raise ConfigError(f"phase {idle!r} of the task has nothing to train: all of it is frozen")
    return divided, lines


def check_phases(settings: Any, phases: Collection[str] | None) -> str:
    """Return the problem with `optimizer.phases`, or an empty string.

    Args:
        settings: optimizer settings by phase.
        phases: the task's phases; None if not known yet.
    """
    if not (
        isinstance(settings, Mapping) and all(isinstance(v, Mapping) for v in settings.values())
    ):
        return "is not a mapping of phases to settings, such as {generator: {lr: 0.0001}}"
    for name in settings if phases is not None else ():
        if not phases:
            return f"contains {name!r}, but the task has no phases"
        if name not in phases:
            return (
                f"contains {name!r}, which is not a phase of the task{closest(str(name), phases)}"
            )
    return ""


def check_rules(rules: Any) -> str:
    """Return the problem with `optimizer.groups`, or an empty string."""
    is_listed = isinstance(rules, list) and all(isinstance(rule, Mapping) for rule in rules)
    if not is_listed:
        return "is not a list of groups with names: [patterns] and optimizer settings"
    for index, rule in enumerate(rules):
        names = rule.get("names")
        if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
            return f"[{index}] needs a list of patterns, such as names: ['*.bias']"
        if len(rule) == 1:
            return f"[{index}] has no setting, such as weight_decay: 0"
    return ""


def _matching(model: nn.Module, pattern: str, key: str) -> dict[str, nn.Parameter]:
    named = dict(model.named_parameters())
    matches = {name: p for name, p in named.items() if fnmatchcase(name, pattern)}
    if not matches:
        raise ConfigError(f"{key}: no parameter matches {pattern!r}{closest(pattern, named)}")
    return matches


def _line(label: str, pattern: str, matches: Mapping[str, nn.Parameter]) -> str:
    total = sum(p.numel() for p in matches.values())
    return f"{label}  {pattern}  {len(matches):,} tensors, {total:,} parameters"
