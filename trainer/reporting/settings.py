"""The configuration as a searchable table, and differences between configurations."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.core.nested import flatten
from trainer.reporting.facts import Facts
from trainer.reporting.markup import Html, joined, listing, tag

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


def table(run: Facts) -> Html:
    """Return the newest configuration; differences to earlier attempts are marked."""
    if not run.config:
        return tag("p", "The run has no config.yaml; it is written when an attempt starts.",
                   class_="none")  # fmt: skip
    attempts = by_attempt(run)
    changed = set(differing(list(attempts.values()))) if attempts else set()
    rows: list[Html] = []
    newest = flatten(run.config)
    group = None
    for key in [*newest, *sorted(changed - newest.keys())]:
        top, dot, rest = key.partition(".")
        if dot and top != group:
            rows.append(tag("tr", tag("th", top, colspan=2), class_="group"))
        group = top if dot else None
        now = tag("code", setting_text(newest.get(key, _ABSENT)))
        before = _before(attempts, key, newest) if key in changed else None
        name = tag("td", rest if dot else key, class_="inner" if dot else None)
        mark = "changed" if key in changed else None
        rows.append(tag("tr", name, tag("td", now, before), class_=mark, data_key=key))
    search = tag(
        "input", type="search", placeholder="search settings", aria_label="search settings",
        class_="search",
    )  # fmt: skip
    count = tag("span", class_="found", aria_live="polite")
    head = tag("div", search, count, _intro(attempts, changed), class_="searching")
    body = tag("table", tag("tbody", *rows), class_="settings")
    return joined([head, tag("div", body, class_="scroll tall")])


def _intro(attempts: Mapping[int, Any], changed: set[str]) -> Html | None:
    if len(attempts) < 2:
        return None
    numbers = ", ".join(map(str, attempts))
    text = f"{len(changed)} changed" if changed else "no setting changed"
    return tag("span", f"{text} between attempts {numbers}, as far as stored", class_="hint")


def _before(attempts: Mapping[int, Mapping[str, Any]], key: str, newest: Mapping[str, Any]) -> Html:
    value = newest.get(key, _ABSENT)
    earlier = [
        tag("span", f"attempt {number}: ", tag("code", setting_text(config.get(key, _ABSENT))))
        for number, config in attempts.items()
        if config.get(key, _ABSENT) != value
    ]
    return tag("span", *earlier, class_="before")


def differences(runs: Sequence[Facts], names: Sequence[str]) -> Html:
    """Return the settings in which runs differ, a column per run."""
    configs = [flatten(run.config) for run in runs]
    keys = [key for key in differing(configs) if key not in ("name", "run_dir")]
    if not keys:
        return tag("p", "All settings are the same.", class_="none")
    rows = [
        [key, *(tag("code", setting_text(config.get(key, _ABSENT))) for config in configs)]
        for key in keys
    ]
    return listing(["setting", *names], rows)
