"""Direction of a better metric: `max` or `min`, by its name or its class."""

import re

_MIN_NAMES = re.compile(
    r"(loss|error|perplexity|(^|[^a-z])(mae|mse|rmse|wer|cer|bits_per_byte))$", re.IGNORECASE
)
_MAX_NAMES = re.compile(
    r"(accuracy|(^|[^a-z])(acc|auc|auroc|f1|precision|recall|bleu))$", re.IGNORECASE
)
_NEGATED = re.compile(r"(^|_)neg(ative)?_", re.IGNORECASE)
"""Prefix of negated losses, as in scikit-learn: larger is better."""


def by_name(metric: str) -> str | None:
    """Return the mode that a metric's name implies, or None."""
    if _MIN_NAMES.search(metric):
        return "max" if _NEGATED.search(metric) else "min"
    return "max" if _MAX_NAMES.search(metric) else None


def resolve(metric: str, stored: str | None = None, higher_is_better: object = None) -> str:
    """Return the mode of a metric.

    Args:
        metric: the metric's name; its mode by name precedes the others.
        stored: mode in a configuration, which may be a default of an earlier version.
        higher_is_better: attribute of a torchmetrics metric; other values than booleans are
            ignored.
    """
    by_class = None
    if isinstance(higher_is_better, bool):
        by_class = "max" if higher_is_better else "min"
    return by_name(metric) or by_class or stored or "max"


def contradiction(metric: str, mode: str | None, higher_is_better: object = None) -> str:
    """Return why an explicit mode contradicts the metric, or an empty string."""
    expected = resolve(metric, mode, higher_is_better)
    if mode is None or mode == expected:
        return ""
    better = "smaller" if expected == "min" else "larger"
    return (
        f"{mode!r} would select the worst checkpoint: a {better} {metric!r} is better. Remove it, "
        f"or use {expected}; if that is wrong, give the metric another name"
    )
