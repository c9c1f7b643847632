"""The attempts of a run: their time line, what its saves took, a table."""

from collections.abc import Mapping
from typing import Any

from trainer.checkpoint import attempts
from trainer.core.formatting import duration, integer, size
from trainer.reporting import clock, timeline
from trainer.reporting.curves import is_number
from trainer.reporting.facts import Facts
from trainer.reporting.markup import Html, joined, listing, tag


def draw(run: Facts) -> Html:
    """Return the time line, and a table of the attempts."""
    spans = clock.spans(run)
    took_s = {span.record["attempt"]: span.end_s - span.begin_s for span in spans}
    rows = [
        _attempt(run, record, duration(took_s.get(record["attempt"])))
        for record in reversed(run.records)
    ]
    titles = ["", "began (UTC)", "where", "steps", "took", "how it ended"]
    summary = _saving(run)
    table = listing(titles, rows, numbers=(0, 4), plain=(1, 3), class_="attempts") if rows else None
    return joined([timeline.draw(run, spans), summary, table])


def _attempt(run: Facts, record: Mapping[str, Any], took: str) -> list[object]:
    is_newest = record is run.records[-1]
    state = run.standing.state if is_newest else timeline.outcome(record)
    ranks, device = record.get("world_size"), record.get("device")
    where = f"{record.get('host', '?')}, {ranks} × {device}" if ranks else record.get("host", "?")
    last = run.step if is_newest else attempts.last_step(run.records, record)
    began = str(record.get("started", "")).removesuffix("+00:00").replace("T", " ")
    changed = record.get("changed")
    lines = [str(one) for one in changed] if isinstance(changed, list) else []
    how = [tag("span", state, class_=f"pill {state}"), " ", _reason(run, record, is_newest)]
    if lines:
        how.append(tag("div", "changed: ", joined((tag("code", one) for one in lines), ", ")))
    steps = f"{integer(record.get('first_step'))} … {integer(last)}"
    return [record.get("attempt"), began, where, steps, took, joined(how)]


def _reason(run: Facts, record: Mapping[str, Any], is_newest: bool) -> str:
    if is_newest and "ended" not in record:
        return run.standing.why
    if "ended" not in record:
        return "without a word: SIGKILL, lack of memory or of power"
    return str(record.get("error") or record.get("reason") or "")


def _saving(run: Facts) -> Html | None:
    """Return what saves took, where the run has noted it."""
    parts = []
    for key, name in (("save_s", "a save took"), ("stall_s", "training stood still for")):
        found = sorted(float(save[key]) for save in run.saves if is_number(save.get(key)))
        if found:
            middle, most = found[len(found) // 2], found[-1]
            parts.append(f"{name} {duration(middle)} (median; longest {duration(most)})")
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
