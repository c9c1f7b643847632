"""Which parameters are trained, and which with settings of their own: patterns over their names."""

from collections.abc import Mapping, Sequence
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
