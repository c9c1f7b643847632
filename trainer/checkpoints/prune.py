"""`prune`: delete checkpoints outside of the retention policy, and orphaned files."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from trainer.checkpoint import lineage, select
from trainer.checkpoint.inspection import CheckpointStatus, inspect, is_complete
from trainer.checkpoint.lineage import MANIFEST, Attempt
from trainer.checkpoint.location import Location
from trainer.checkpoints.answer import Answer, open_checkpoints, status_json
from trainer.cli import Arguments
from trainer.config.schema import setting
from trainer.core import intervals, metric_mode
from trainer.core.formatting import ask, pluralize, size, table
from trainer.errors import DONE, CheckpointError, ConfigError


@dataclass(frozen=True)
class Retention:
    """Options of `prune`, by default those of the run's configuration."""

    keep_last: int | None = setting(None, "newest checkpoints to keep", at_least=0)
    keep_best: int | None = setting(None, "best checkpoints to keep", at_least=0)
    keep_every_steps: int | None = setting(None, "keep every N-th step's checkpoint", at_least=1)


def prune(arguments: Arguments[Retention]) -> Answer:
    """Delete after a confirmation; return the deleted folders."""
    location = open_checkpoints(arguments.places[0], arguments.store)
    store = location.store
    retained, obsolete = _plan(location, arguments.options)
    rows = [["step", "attempt", "size", "state"]]
    for status in obsolete:
        row = [f"{status.commit.step:,}", str(status.commit.attempt)]
        rows.append([*row, size(status.size_bytes), status.state])
    total_bytes = sum(status.size_bytes for status in obsolete)
    content = {
        "path": location.url,
        "deleted": [status_json(status) for status in obsolete],
        "kept": sorted(retained),
        "freed_bytes": total_bytes,
    }
    if not obsolete:
        return DONE, content, "nothing to delete"
    folders = pluralize(len(obsolete), "folder")
    question = f"{table(rows)}\ndelete {folders} in {location.url}"
    ask(question, is_agreed="--yes" in arguments.flags)
    if _plan(location, arguments.options) != (retained, obsolete):
        raise ConfigError(f"{location.url} changed in the meantime; nothing was deleted. Run again")
    records = lineage.records(store) if location.is_run else []
    newest = Attempt(max((record["attempt"] for record in records), default=0), "")
    for status in obsolete:
        folder = status.commit.folder
        if status.state == "orphaned" and MANIFEST not in store.entries(folder):
            lineage.discard(store, folder, newest)
        else:
            lineage.delete(store, folder)
    return DONE, content, f"{folders} deleted, {size(total_bytes)} freed"


def _plan(location: Location, options: Retention) -> tuple[set[int], list[CheckpointStatus]]:
    """Return the steps to retain and the folders to delete."""
    statuses = inspect(location)
    intact = [status for status in statuses if status.state == "intact"]
    while intact and not is_complete(location.store, intact[-1]):
        intact.pop()  # an incomplete checkpoint must not replace older ones
    if not intact:
        select.pick(location, "latest")  # raises: no checkpoint
        raise CheckpointError(f"{location.url}: no checkpoint is intact, so nothing is deleted")
    retained = _retained(location, intact, options)
    obsolete = [status for status in intact if status.commit.step not in retained]
    return retained, [
        *obsolete,
        *(status for status in statuses if status.state in ("abandoned", "orphaned")),
    ]


def _retained(
    location: Location, intact: Sequence[CheckpointStatus], options: Retention
) -> set[int]:
    """Return the steps to retain by the options, or else by the run's configuration."""
    newest = intact[-1].manifest
    policy = lineage.retention_of(newest) if newest else {}
    policy |= {key: count for key, count in asdict(options).items() if count is not None}
    if options.keep_best and not policy.get("metric"):
        raise ConfigError(
            f"keep_best: {location.url} tracks no metric (checkpoint.metric is not set)"
        )
    if not policy:
        raise ConfigError(
            f"{location.url} has no retention policy in its configuration; pass one, such as "
            "keep_last=2"
        )
    metric = str(policy.get("metric") or "")
    values = {status.commit.step: status.metrics.get(metric) for status in intact}
    stale = intervals.stale(
        values,
        keep_last=policy.get("keep_last", 2),
        keep_best=policy.get("keep_best", 1) if metric else 0,
        mode=metric_mode.resolve(metric, policy.get("mode")),
        keep_every_steps=policy.get("keep_every_steps"),
    )
    retained = set(values) - set(stale)
    for record in lineage.records(location.store)[-1:] if location.is_run else ():
        if "ended" not in record and record.get("resumed_from"):
            retained.add(record["resumed_from"]["step"])  # the attempt may still be reading it
    return retained & set(values)
