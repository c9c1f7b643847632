"""The configuration as a searchable table, and differences between configurations."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.core.nested import flatten
from trainer.reporting.facts import Facts

_ABSENT = object()


def setting_text(value: object) -> str:
    """Return a setting as typed on the command line."""
    if value is _ABSENT:
        return "(not set)"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def by_attempt(run: Facts) -> dict[int, dict[str, Any]]:
    """Return the settings of each attempt that a checkpoint or config.yaml still has."""
    configs = {
        checkpoint.commit.attempt: flatten(checkpoint.manifest.config)
        for checkpoint in run.checkpoints
        if checkpoint.manifest is not None and checkpoint.manifest.config
    }
    if run.config and run.records:
        configs[run.records[-1]["attempt"]] = flatten(run.config)
    return dict(sorted(configs.items()))


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that do not have the same value in all flat configurations, sorted."""
    keys = {key for config in configs for key in config}
    return sorted(
        key
        for key in keys
        if any(config.get(key, _ABSENT) != configs[0].get(key, _ABSENT) for config in configs)
    )


def table(run: Facts) -> dict[str, Any]:
    """Return the newest configuration, with differences to earlier attempts."""
    attempts = by_attempt(run)
    changed = set(differing(list(attempts.values()))) if attempts else set()
    newest = flatten(run.config)
    keys = [*newest, *sorted(changed - newest.keys())] if newest else []
    return {
        "rows": [_row(key, newest, attempts if key in changed else {}) for key in keys],
        "changed": len(changed),
        "attempts": list(attempts),
    }


def _row(
    key: str, newest: Mapping[str, Any], attempts: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a setting; `attempts` are those to compare with, if its values differ."""
    group, dot, name = key.partition(".")
    value = newest.get(key, _ABSENT)
    return {
        "key": key,
        "group": group if dot else "",
        "name": name if dot else key,
        "value": setting_text(value),
        "changed": bool(attempts),
        "before": [
            (number, setting_text(config.get(key, _ABSENT)))
            for number, config in attempts.items()
            if config.get(key, _ABSENT) != value
        ],
    }


def differences(runs: Sequence[Facts]) -> list[tuple[str, list[str]]]:
    """Return each setting in which runs differ, with its value in each of them."""
    configs = [flatten(run.config) for run in runs]
    return [
        (key, [setting_text(config.get(key, _ABSENT)) for config in configs])
        for key in differing(configs)
        if key not in ("name", "run_dir")
    ]
