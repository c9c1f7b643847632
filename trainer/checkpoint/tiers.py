"""A run's places, one or two: where it saves, and the mirror that copies go to.

Each of them can be lost without losing what the other holds: records of attempts are in both, and
which checkpoints count is decided from all records and all manifests together.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import Attempt, Commit
from trainer.errors import ConfigError
from trainer.storage.store import AlreadyExists, Store


class Tiers:
    """The stores of one run.

    Args:
        run: where the run saves; nodes may have one each, if there is a mirror.
        mirror: where its checkpoints are copied to; one place for all nodes.
    """

    def __init__(self, run: Store, mirror: Store | None = None) -> None:
        self.run, self.mirror = run, mirror

    @property
    def stores(self) -> Sequence[Store]:
        """Return the run's own store, then the mirror, if there is one."""
        return [self.run] if self.mirror is None else [self.run, self.mirror]

    def records(self) -> list[dict[str, Any]]:
        """Return the records of all attempts, oldest first, whichever store has them.

        Raises:
            ConfigError: the two stores are of two runs.
        """
        found: dict[int, dict[str, Any]] = {}
        for store in self.stores:
            for record in lineage.records(store):
                number = record["attempt"]
                earlier = found.get(number, record)
                if earlier.get("token") != record.get("token"):
                    raise ConfigError(
                        f"checkpoint.mirror={store.url} is of another run than {self.run.url}: "
                        f"attempt {number} was started {record.get('started')} on "
                        f"{record.get('host')} there, {earlier.get('started')} on "
                        f"{earlier.get('host')} here. Give this run a mirror of its own"
                    )
                ended_here = "ended" in earlier or "ended" not in record
                newest, other = (earlier, record) if ended_here else (record, earlier)
                found[number] = {**other, **newest}
        return [found[number] for number in sorted(found)]

    def survey(self) -> "Survey":
        """Look at all records and checkpoints, once."""
        known = self.records()
        whole = [lineage.commits(store, known=known) for store in self.stores]
        present = [lineage.commits(store, known=known, damaged=True) for store in self.stores]
        return Survey(self.stores, known, whole, present)

    def begin(self, facts: Mapping[str, Any]) -> Attempt:
        """Create the next attempt's record, in both stores. Rank 0 only.

        The mirror, which all nodes share, decides between starts at the same moment. Records that
        only one store has, or that ended in only one, are brought to the other.
        """
        if self.mirror is None:
            return lineage.begin(self.run, facts)
        known = self.records()
        for store in self.stores:
            has = {record["attempt"]: record for record in lineage.records(store)}
            for record in known:
                if has.get(record["attempt"]) != record:
                    lineage.restore_record(store, record)
        above = known[-1]["attempt"] if known else 0
        while True:
            attempt = lineage.begin(self.mirror, facts, above=above)
            try:
                lineage.begin_as(self.run, attempt, facts)
            except AlreadyExists:  # by a start without this mirror, at the same moment
                above = attempt.number
                continue
            return attempt

    def amend(self, attempt: Attempt, facts: Mapping[str, Any]) -> None:
        """Add facts to an attempt's own record, durably, in both. Rank 0 only."""
        for store in self.stores:
            lineage.amend(store, attempt, facts)

    def tell(self, attempt: Attempt, facts: Mapping[str, Any]) -> None:
        """Replace what the attempt says of itself now and then. Rank 0 only."""
        for store in self.stores:
            lineage.tell(store, attempt, facts)


class Survey:
    """What the stores of a run held at one moment.

    Args:
        stores: the run's own, then its mirror, if there is one.
        records: of all attempts, oldest first.
        whole: the committed checkpoints of the surviving timeline in each store, oldest first.
        present: the same, with those that carry a mark of proven damage.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        records: list[dict[str, Any]],
        whole: Sequence[list[Commit]],
        present: Sequence[list[Commit]],
    ) -> None:
        self.records = records
        self.commits = sorted({commit for commits in whole for commit in commits})
        """Committed and not known to be damaged in every store that has it; oldest first."""
        self.with_damaged = sorted({commit for commits in present for commit in commits})
        self._stores, self._whole, self._present = stores, whole, present

    def is_copied(self, commit: Commit) -> bool:
        """Return whether the mirror has a checkpoint, if there is a mirror."""
        return commit in self._whole[-1] or len(self._stores) == 1

    def views(self, commit: Commit) -> list[Sequence[Store]]:
        """Return where to read a checkpoint from, best first.

        First from the run's own store, and from the mirror what is not there (other nodes' shards,
        after a move); then, if that was proven wrong, from the mirror alone.
        """
        if len(self._stores) == 1:
            return [self._stores]
        is_marked = commit in self._present[0] and commit not in self._whole[0]
        views = [] if is_marked else [self._stores]
        return [*views, self._stores[1:]] if commit in self._whole[1] else views
