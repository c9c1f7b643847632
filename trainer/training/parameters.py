"""Which parameters are trained, and which with settings of their own: patterns over their names."""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from trainer.errors import ConfigError, closest


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters that match, in place.

    Args:
        model: the plain module.
        patterns: shell patterns over whole parameter names, such as `body.*`.

    Returns:
        A line for each pattern: what it matched.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    lines = []
    for pattern in patterns:
        matched = _matching(model, pattern, "trainer.freeze")
        for parameter in matched.values():
            parameter.requires_grad_(False)
        lines.append(_line("frozen", pattern, matched))
    if patterns and not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"trainer.freeze={list(patterns)} leaves nothing to train")
    return lines


def groups(
    model: nn.Module, rules: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Divide the parameters that are trained into an optimizer's groups.

    Args:
        model: the plain module, after `freeze`.
        rules: each with `names`, a list of patterns, and settings of the optimizer for those that
            match, such as `weight_decay` or `lr`. A parameter belongs to the first that matches.

    Returns:
        The groups, those without a rule first, each in the model's order; and a line for each
        pattern: what it matched.

    Raises:
        ConfigError: a pattern matches nothing that is trained and that no earlier rule has taken.
    """
    left = {name: p for name, p in model.named_parameters() if p.requires_grad}
    made, lines = [], []
    for index, rule in enumerate(rules):
        settings = {key: value for key, value in rule.items() if key != "names"}
        shown = ", ".join(f"{key}={value}" for key, value in settings.items())
        own: dict[str, nn.Parameter] = {}
        for pattern in rule["names"]:
            key = f"optimizer.groups[{index}].names"
            matched = {n: p for n, p in _matching(model, pattern, key).items() if n in left}
            if not matched:
                raise ConfigError(
                    f"{key}: all that {pattern!r} matches is frozen or taken by an earlier "
                    "pattern; leave it out, or put it first"
                )
            own |= matched
            left = {name: p for name, p in left.items() if name not in matched}
            lines.append(_line(shown, pattern, matched))
        made.append({"params": [p for p in model.parameters() if _is_in(p, own)], **settings})
    rest = [{"params": list(left.values())}] if left or not made else []
    return rest + made, lines


def phases(
    model: nn.Module, stated: Mapping[str, str | Sequence[str]]
) -> tuple[dict[str, list[str]], list[str]]:
    """Divide the parameters that are trained among the phases of a step.

    Args:
        model: the plain module, after `freeze`.
        stated: by the phase's name, patterns of the names of the parameters trained in it.

    Returns:
        By the phase's name, the names of its parameters in the model's order; and a line for each
        pattern: what it matched.

    Raises:
        ConfigError: a pattern matches nothing, a phase has nothing to train, or a parameter that
            is trained is not in exactly one phase.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    owner: dict[str, str] = {}
    lines = []
    for phase, patterns in stated.items():
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matched = _matching(model, pattern, f"phase {phase!r} of the task")
            for name in matched:
                if owner.setdefault(name, phase) != phase:
                    raise ConfigError(
                        f"parameter {name!r} belongs to two phases of the task, {owner[name]!r} "
                        f"and {phase!r}; each is trained in one of them: change their patterns"
                    )
            lines.append(_line(f"phase {phase}", pattern, matched))
    left = [name for name in trained if name not in owner]
    if left:
        raise ConfigError(
            f"parameter {left[0]!r} belongs to none of the task's phases ({', '.join(stated)}), so "
            "it would never be trained; let a phase's pattern match it, or freeze it "
            "(trainer.freeze)"
        )
    divided = {phase: [n for n in trained if owner[n] == phase] for phase in stated}
    idle = next((phase for phase, names in divided.items() if not names), None)
    if idle is not None:
        raise ConfigError(f"phase {idle!r} of the task has nothing to train: all of it is frozen")
    return divided, lines


def check_phases(given: Any, stated: Collection[str] | None) -> str:
    """Return what is wrong with the form of `optimizer.phases`, or an empty text.

    Args:
        given: settings of the optimizer by the phase's name.
        stated: the names of the task's phases; None if they are not known yet.
    """
    if not (isinstance(given, Mapping) and all(isinstance(v, Mapping) for v in given.values())):
        return "is not a mapping of phases, each with settings such as {generator: {lr: 0.0001}}"
    for name in given if stated is not None else ():
        if not stated:
            return f"names {name!r}, but the task has no phases"
        if name not in stated:
            return f"names {name!r}, which is no phase of the task{closest(str(name), stated)}"
    return ""


def check_rules(rules: Any) -> str:
    """Return what is wrong with the form of `optimizer.groups`, or an empty text."""
    is_listed = isinstance(rules, list) and all(isinstance(rule, Mapping) for rule in rules)
    if not is_listed:
        return "is not a list of groups, each with names: [patterns] and settings of the optimizer"
    for index, rule in enumerate(rules):
        names = rule.get("names")
        if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
            return f"[{index}] has no names: a list of patterns, such as ['*.bias']"
        if len(rule) == 1:
            return f"[{index}] has no setting of its own, such as weight_decay: 0"
    return ""


def _matching(model: nn.Module, pattern: str, key: str) -> dict[str, nn.Parameter]:
    named = dict(model.named_parameters())
    matched = {name: p for name, p in named.items() if fnmatchcase(name, pattern)}
    if not matched:
        raise ConfigError(f"{key}: no parameter is called {pattern!r}{closest(pattern, named)}")
    return matched


def _is_in(parameter: nn.Parameter, chosen: Mapping[str, nn.Parameter]) -> bool:
    return any(parameter is other for other in chosen.values())


def _line(what: str, pattern: str, matched: Mapping[str, nn.Parameter]) -> str:
    numbers = sum(p.numel() for p in matched.values())
    return f"{what}  {pattern}  {len(matched):,} tensors, {numbers:,} parameters"
