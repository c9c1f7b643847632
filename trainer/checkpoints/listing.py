"""`list`: one line for each checkpoint folder."""

from trainer.checkpoint.inspection import best, inspect
from trainer.checkpoints.answer import Answer, open_checkpoints, status_json
from trainer.cli import Arguments, NoOptions
from trainer.core.formatting import age, size, table
from trainer.errors import DONE


def list_checkpoints(arguments: Arguments[NoOptions]) -> Answer:
    """Return a table of all checkpoint folders."""
    location = open_checkpoints(arguments.places[0], arguments.store)
    statuses = inspect(location)
    best_status = best(statuses)
    rows = [["step", "attempt", "size", "age", "ranks", "state", "metrics"]]
    for status in statuses:
        rows.append(
            [
                f"{status.commit.step:,}",
                str(status.commit.attempt),
                size(status.size_bytes),
                "" if status.saved_s is None else age(status.saved_s),
                "" if status.manifest is None else str(status.manifest.world_size),
                status.state + (f": {status.reason}" if status.reason else ""),
                ", ".join(f"{name} {value:.4g}" for name, value in status.metrics.items())
                + (" (best)" if status is best_status else ""),
            ]
        )
    content = {
        "path": location.url,
        "is_run": location.is_run,
        "checkpoints": [
            {**status_json(status), "best": status is best_status} for status in statuses
        ],
    }
    return DONE, content, table(rows) if statuses else f"{location.url} has no checkpoints yet"
