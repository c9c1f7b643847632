"""The attempts section: a timeline, save durations and a table."""

from collections.abc import Mapping
from typing import Any

from trainer.checkpoint import attempts
from trainer.core.formatting import duration, integer, size
from trainer.reporting import clock, timeline
from trainer.reporting.curves import is_number
from trainer.reporting.facts import Facts
from trainer.reporting.markup import Html, joined, listing, tag


def draw(run: Facts) -> Html:
    """Return the timeline and the table of attempts."""
    spans = clock.spans(run)
    durations_s = {span.record["attempt"]: span.end_s - span.begin_s for span in spans}
    rows = [
        _attempt(run, record, duration(durations_s.get(record["attempt"])))
        for record in reversed(run.records)
    ]
    titles = ["", "started (UTC)", "host", "steps", "duration", "end"]
    summary = _saving(run)
    table = listing(titles, rows, numbers=(0, 4), plain=(1, 3), class_="attempts") if rows else None
    return joined([timeline.draw(run, spans), summary, table])


def _attempt(run: Facts, record: Mapping[str, Any], duration_text: str) -> list[object]:
    is_newest = record is run.records[-1]
    state = run.condition.state if is_newest else timeline.outcome(record)
    ranks, device = record.get("world_size"), record.get("device")
    location = (
        f"{record.get('host', '?')}, {ranks} × {device}" if ranks else record.get("host", "?")
    )
    last_step = run.step if is_newest else attempts.last_step(run.records, record)
    started = str(record.get("started", "")).removesuffix("+00:00").replace("T", " ")
    changed = record.get("changed")
    lines = [str(one) for one in changed] if isinstance(changed, list) else []
    end_cells = [tag("span", state, class_=f"pill {state}"), " ", _reason(run, record, is_newest)]
    if lines:
        end_cells.append(tag("div", "changed: ", joined((tag("code", one) for one in lines), ", ")))
    steps = f"{integer(record.get('first_step'))} … {integer(last_step)}"
    return [record.get("attempt"), started, location, steps, duration_text, joined(end_cells)]


def _reason(run: Facts, record: Mapping[str, Any], is_newest: bool) -> str:
    if is_newest and "ended" not in record:
        return run.condition.reason
    if "ended" not in record:
        return "no end recorded: SIGKILL, out of memory or power failure"
    return str(record.get("error") or record.get("reason") or "")


def _saving(run: Facts) -> Html | None:
    """Return a sentence on save durations, if recorded."""
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
        return None
    return tag("p", f"{len(run.saves):,} saves: " + "; ".join(parts) + ".", class_="hint")
