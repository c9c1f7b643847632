"""`verify`: read and check every byte."""

import time
from collections.abc import Callable

from trainer.checkpoint import select
from trainer.checkpoint.inspection import CheckpointStatus, inspect
from trainer.checkpoint.location import Location
from trainer.checkpoints.answer import AllSteps, Answer, files_bytes, open_checkpoints
from trainer.cli import Arguments
from trainer.core.formatting import progress, size
from trainer.errors import DONE, FAILURE, CheckpointError


def verify(arguments: Arguments[AllSteps]) -> Answer:
    """Return the first damage of each checkpoint; exit code 1 for any."""
    location = open_checkpoints(arguments.places[0], arguments.store)
    step = arguments.options.step
    if step == "all":
        statuses = [item for item in inspect(location) if item.state in ("intact", "damaged")]
        if not statuses:
            select.pick(location, "latest")  # raises: no checkpoint
    else:
        commit = select.pick(location, step)
        manifest = location.manifest(commit)
        statuses = [CheckpointStatus(commit, "intact", "", manifest, files_bytes(manifest))]
    results, lines = [], []
    total_bytes = sum(status.size_bytes for status in statuses)
    with progress("verifying", total_bytes, is_quiet="--json" in arguments.flags) as advance:
        for status in statuses:
            commit, start_s = status.commit, time.monotonic()
            damage = _damage(location, status, advance)
            results.append({"step": commit.step, "folder": commit.folder, "damage": damage or None})
            rate = size(status.size_bytes / (time.monotonic() - start_s))
            outcome = f"intact, {size(status.size_bytes)} read at {rate}/s"
            lines.append(f"step {commit.step:,}: " + (f"damaged: {damage}" if damage else outcome))
    content = {"path": location.url, "checkpoints": results}
    is_damaged = any(result["damage"] for result in results)
    return FAILURE if is_damaged else DONE, content, "\n".join(lines)


def _damage(location: Location, status: CheckpointStatus, advance: Callable[[int], object]) -> str:
    """Return a description of the first damage, or an empty text."""
    if status.manifest is None:
        return status.reason
    try:
        location.reader(status.commit).verify(progress=advance)
    except CheckpointError as error:
        return str(error)
    return ""
