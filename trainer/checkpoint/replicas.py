"""The stores of one run: its own and an optional mirror.

Either store can be lost without losing the contents of the other. Attempt records are in both,
and the records and manifests of both together decide which checkpoints are used. The mirror has
the layout of a run directory: the same folders, attempt records and metrics.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import Attempt, Commit
from trainer.errors import ConfigError
from trainer.storage.store import AlreadyExists, Store


class Replicas:
    """The run's own store and its mirror.

    Args:
        run: the store that the run saves to; with a mirror, it may be node-local.
        mirror: the store that checkpoints are copied to; the same for all nodes.
    """

    def __init__(self, run: Store, mirror: Store | None = None) -> None:
        self.run, self.mirror = run, mirror

    @property
    def stores(self) -> Sequence[Store]:
        """Return the run's own store, then the mirror, if any."""
        return [self.run] if self.mirror is None else [self.run, self.mirror]

    def records(self) -> list[dict[str, Any]]:
        """Return the records of all attempts from both stores, oldest first.

        Raises:
            ConfigError: the stores belong to different runs.
        """
        merged: dict[int, dict[str, Any]] = {}
        for store in self.stores:
            for record in lineage.records(store):
                number = record["attempt"]
                earlier = merged.get(number, record)
                if earlier.get("token") != record.get("token"):
                    raise ConfigError(
                        f"checkpoint.mirror={store.url} belongs to another run than "
                        f"{self.run.url}: its attempt {number} was started "
                        f"{record.get('started')} on {record.get('host')}, this run's was started "
                        f"{earlier.get('started')} on {earlier.get('host')}. Choose another mirror"
                    )
                keep_first = "ended" in earlier or "ended" not in record
                newest, other = (earlier, record) if keep_first else (record, earlier)
                merged[number] = {**other, **newest}
        return [merged[number] for number in sorted(merged)]

    def survey(self) -> "Survey":
        """Read all attempt records and list all checkpoints."""
        records = self.records()
        intact = [lineage.commits(store, records=records) for store in self.stores]
        present = [lineage.commits(store, records=records, damaged=True) for store in self.stores]
        return Survey(self.stores, records, intact, present)

    def begin(self, facts: Mapping[str, Any]) -> Attempt:
        """Create the next attempt's record in both stores. Rank 0 only.

        The mirror, which all nodes share, decides between concurrent starts. Records that one
        store is missing, or that ended in only one, are copied to the other.
        """
        if self.mirror is None:
            return lineage.begin(self.run, facts)
        records = self.records()
        for store in self.stores:
            stored = {record["attempt"]: record for record in lineage.records(store)}
            for record in records:
                if stored.get(record["attempt"]) != record:
                    lineage.restore_record(store, record)
        above = records[-1]["attempt"] if records else 0
        while True:
            attempt = lineage.begin(self.mirror, facts, above=above)
            try:
                lineage.create_record(self.run, attempt, facts)
            except AlreadyExists:  # by a concurrent start without this mirror
                above = attempt.number
                continue
            return attempt

    def amend(self, attempt: Attempt, facts: Mapping[str, Any]) -> None:
        """Add values to an attempt's record in both stores, durably. Rank 0 only."""
        for store in self.stores:
            lineage.amend(store, attempt, facts)

    def write_heartbeat(self, attempt: Attempt, facts: Mapping[str, Any]) -> None:
        """Update the attempt's heartbeat record in both stores. Rank 0 only."""
        for store in self.stores:
            lineage.write_heartbeat(store, attempt, facts)


class Survey:
    """Checkpoints and attempt records at the time of `Replicas.survey`.

    Args:
        stores: the run's own, then the mirror, if any.
        records: attempt records, oldest first.
        intact: for each store, commits that are not marked as damaged, oldest first.
        present: for each store, all commits, oldest first.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        records: list[dict[str, Any]],
        intact: Sequence[list[Commit]],
        present: Sequence[list[Commit]],
    ) -> None:
        self.records = records
        self.commits = sorted({commit for commits in intact for commit in commits})
        """Commits not marked as damaged in at least one store, oldest first."""
        self.with_damaged = sorted({commit for commits in present for commit in commits})
        """All commits, oldest first."""
        self._stores, self._intact, self._present = stores, intact, present

    def is_copied(self, commit: Commit) -> bool:
        """Return whether the mirror has a checkpoint; True without a mirror."""
        return commit in self._intact[-1] or len(self._stores) == 1

    def views(self, commit: Commit) -> list[Sequence[Store]]:
        """Return the store combinations to read a checkpoint from, best first.

        First the run's own store, and the mirror for shards that it does not have (those of other
        nodes). Then, for damage in the run's own store, the mirror alone.
        """
        if len(self._stores) == 1:
            return [self._stores]
        is_marked = commit in self._present[0] and commit not in self._intact[0]
        views = [] if is_marked else [self._stores]
        return [*views, self._stores[1:]] if commit in self._intact[1] else views
