"""The attempts section: a timeline, save durations and a table."""

from collections.abc import Mapping
from typing import Any

from trainer.checkpoint import attempts
from trainer.core.formatting import duration, integer, size
from trainer.reporting import clock, timeline
from trainer.reporting.curves import is_number
from trainer.reporting.facts import Facts


def section(run: Facts) -> dict[str, Any]:
    """Return the timeline, a sentence on saves and the rows of the table, newest first."""
    spans = clock.spans(run)
    durations_s = {span.record["attempt"]: span.end_s - span.begin_s for span in spans}
    rows = [
        _row(run, record, duration(durations_s.get(record["attempt"])))
        for record in reversed(run.records)
    ]
    return {"timeline": timeline.drawn(run, spans), "saving": _saving(run), "rows": rows}


def _row(run: Facts, record: Mapping[str, Any], duration_text: str) -> dict[str, Any]:
    is_newest = record is run.records[-1]
    host, ranks = record.get("host", "?"), record.get("world_size")
    last_step = run.step if is_newest else attempts.last_step(run.records, record)
    changed = record.get("changed")
    return {
        "attempt": record.get("attempt"),
        "started": str(record.get("started", "")).removesuffix("+00:00").replace("T", " "),
        "location": f"{host}, {ranks} × {record.get('device')}" if ranks else host,
        "steps": f"{integer(record.get('first_step'))} … {integer(last_step)}",
        "duration": duration_text,
        "state": run.condition.state if is_newest else timeline.outcome(record),
        "reason": _reason(run, record, is_newest),
        "changed": changed if isinstance(changed, list) else [],
    }


def _reason(run: Facts, record: Mapping[str, Any], is_newest: bool) -> str:
    if is_newest and "ended" not in record:
        return run.condition.reason
    if "ended" not in record:
        return "no end recorded: SIGKILL, out of memory or power failure"
    return str(record.get("error") or record.get("reason") or "")


def _saving(run: Facts) -> str:
    """Return a sentence on save durations, empty if none is recorded."""
    parts = []
    for key, name in (("save_s", "duration"), ("stall_s", "training stall")):
        durations = sorted(float(save[key]) for save in run.saves if is_number(save.get(key)))
        if durations:
            median, longest = durations[len(durations) // 2], durations[-1]
            parts.append(f"{name} {duration(median)} (median; longest {duration(longest)})")
    speeds = sorted(
        save["bytes"] / save["save_s"]
        for save in run.saves
        if is_number(save.get("bytes")) and is_number(save.get("save_s")) and save["save_s"] > 0
    )
    if speeds:
        parts.append(f"{size(speeds[len(speeds) // 2])}/s")
    if not parts:
        return ""
    return f"{len(run.saves):,} saves: " + "; ".join(parts) + "."
