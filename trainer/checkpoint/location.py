"""What lies at a path: a run, a folder of checkpoints, or one of them; and how each one is."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import DAMAGED, FOLDER, MANIFEST, Commit
from trainer.checkpoint.manifest import Manifest, from_bytes, is_shard_name, is_void, parse_folder
from trainer.checkpoint.reader import Reader
from trainer.config.schema import ObjectStore
from trainer.core import intervals
from trainer.errors import CheckpointError, ConfigError
from trainer.storage import Store, is_local, open_store

State = Literal["whole", "damaged", "abandoned", "unfinished", "litter"]


@dataclass(frozen=True)
class Found:
    """A folder of a checkpoint, and what is known of it without reading its shards."""

    commit: Commit
    state: State
    """abandoned: of a timeline that a later attempt left. unfinished: of an attempt that has not
    ended. litter: never committed, and never will be."""
    why: str = ""
    """What is wrong with it."""
    manifest: Manifest | None = None
    size_bytes: int = 0
    saved_s: float | None = None
    """When it was committed, in seconds since 1970."""

    @property
    def metrics(self) -> dict[str, float]:
        """Return what was measured at this very step; the metric that decides is the first."""
        if self.manifest is None:
            return {}
        first = lineage.retention_of(self.manifest).get("metric")
        found = lineage.measurements(self.manifest)
        return {name: found[name] for name in sorted(found, key=lambda name: (name != first, name))}


class Place:
    """Where checkpoints lie.

    Args:
        url: as it was asked for.
        store: that they lie in.
        folders: their keys; None: those of a run, which its attempts decide about.
        is_one: whether the place is the folder of one checkpoint itself.
    """

    def __init__(
        self,
        url: str,
        store: Store,
        folders: Sequence[str] | None = None,
        *,
        is_one: bool = False,
    ) -> None:
        self.url, self.store = url, store
        self.is_one = is_one
        self._folders = folders

    @property
    def is_run(self) -> bool:
        """Whether it is the directory of a run."""
        return self._folders is None

    def commits(self) -> list[Commit]:
        """Return what is committed and not known to be damaged, oldest first.

        Raises:
            CheckpointError: outside of a run: no manifest is whole.
        """
        if self._folders is None:
            return lineage.commits(self.store)
        found, errors = [], []
        for folder in self._folders:
            try:
                made = self._read(folder)
            except CheckpointError as error:
                errors.append(error)
            else:
                found.append(Commit(made.step, made.attempt, folder))
        if errors and not found:
            raise errors[0]
        return sorted(found)

    def pick(self, step: str) -> Commit:
        """Return the newest (`latest`), best (`best`) or a given step's checkpoint.

        Raises:
            ConfigError: there is none.
            CheckpointError: the manifest of one that decides is damaged.
        """
        commits = self.commits()
        if not commits:
            raise ConfigError(
                f"{self.url} holds no committed checkpoint; give the directory of a run, as "
                "`python -m trainer.run` printed it"
            )
        if step == "latest":
            return commits[-1]
        if step == "best":
            return self._best(commits)
        chosen = [commit for commit in commits if str(commit.step) == step]
        if not chosen:
            steps = ", ".join(str(commit.step) for commit in commits)
            raise ConfigError(f"step={step}: {self.url} has latest, best and the steps {steps}")
        return chosen[-1]

    def _best(self, commits: list[Commit]) -> Commit:
        config = lineage.retention_of(self.manifest(commits[-1]))
        metric = config.get("metric")
        if metric is None:
            raise ConfigError(
                f"step=best: {self.url} tracks no metric (checkpoint.metric is not set)"
            )
        by_step = {commit.step: commit for commit in commits}
        values = {
            step: lineage.measured(self.manifest(commit), metric)
            for step, commit in by_step.items()
        }
        best = intervals.best_first(values, config.get("mode", "max"))
        if not best:
            raise CheckpointError(
                f"step=best: no checkpoint of {self.url} has {metric!r} of its own step; save as "
                "often as you evaluate (checkpoint.every_epochs, checkpoint.every_steps)"
            )
        return by_step[best[0]]

    def manifest(self, commit: Commit) -> Manifest:
        """Read and validate a manifest.

        Raises:
            CheckpointError: it is altered, void, of another version or checkpoint, or gone.
        """
        if self._folders is None:
            return lineage.read_manifest(self.store, commit)
        return self._read(commit.folder)

    def reader(self, commit: Commit) -> Reader:
        """Return what reads a checkpoint's tensors, one at a time or all."""
        return Reader(self.store, commit.folder, self.manifest(commit))

    def survey(self) -> list[Found]:
        """Look at every folder, oldest first; reads manifests and lists shards, no more."""
        if self._folders is not None:
            return sorted(
                (self._look(None, folder, self.store.entries(folder)) for folder in self._folders),
                key=lambda found: found.commit,
            )
        folders: dict[str, list[str]] = {}
        for key in self.store.list(FOLDER, unfinished=True):
            folder, _, name = key.rpartition("/")
            folders.setdefault(folder, []).append(name)
        records = lineage.records(self.store)  # after the list: what came meanwhile is not in it
        present = set(lineage.commits(self.store, known=records, damaged=True))
        found = []
        for folder, names in folders.items():
            parsed = parse_folder(folder.removeprefix(f"{FOLDER}/"))
            if parsed is None:
                continue  # not ours
            commit = Commit(*parsed, folder)
            if commit in present:
                found.append(self._look(commit, folder, names))
            else:
                found.append(self._left(commit, names, records))
        return sorted(found, key=lambda found: found.commit)

    # --- beneath it ------------------------------------------------------------------------------

    def _read(self, folder: str) -> Manifest:
        key = f"{folder}/{MANIFEST}"
        try:
            return from_bytes(self.store.read(key), f"{self.store.url}/{key}")
        except FileNotFoundError:
            raise CheckpointError(f"{self.store.url}/{key}: it was deleted meanwhile") from None

    def _look(self, commit: Commit | None, folder: str, names: Sequence[str]) -> Found:
        """Say how a committed checkpoint is; `commit` is known where its folder says it."""
        try:
            made = self._read(folder) if commit is None else self.manifest(commit)
        except CheckpointError as error:
            here = commit or Commit(*numbers(folder), folder)
            return Found(here, "damaged", str(error))
        here = commit or Commit(made.step, made.attempt, folder)
        missing = sorted(made.files.keys() - set(names))
        size_bytes = sum(file.bytes for file in made.files.values())
        saved_s = self._modified_s(f"{folder}/{MANIFEST}")
        state: State = "whole"
        why = ""
        if DAMAGED in names:
            state, why = "damaged", self._mark(folder)
        elif missing:
            state, why = "damaged", f"{missing[0]} is missing"
        return Found(here, state, why, made, size_bytes, saved_s)

    def _mark(self, folder: str) -> str:
        try:
            return str(json.loads(self.store.read(f"{folder}/{DAMAGED}"))["why"])
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            return f"it carries {DAMAGED}"

    def _left(
        self, commit: Commit, names: Sequence[str], records: Sequence[Mapping[str, Any]]
    ) -> Found:
        """Say what a folder is that no surviving timeline has."""
        shards = [f"{commit.folder}/{name}" for name in names if is_shard_name(name)]
        size_bytes = sum(map(self._size, shards))
        later = [
            record
            for record in records
            if record["attempt"] > commit.attempt
            and record.get("resumed_from")
            and record["resumed_from"]["step"] < commit.step
        ]
        if later and MANIFEST in names and not self._is_void(commit):
            number, step = later[0]["attempt"], later[0]["resumed_from"]["step"]
            why = f"attempt {number} went on from step {step}"
            return Found(commit, "abandoned", why, None, size_bytes)
        if any("ended" not in record for record in records[-1:]):
            why = f"attempt {records[-1]['attempt']} has not ended"
            return Found(commit, "unfinished", why, None, size_bytes)
        return Found(commit, "litter", "it was never committed", None, size_bytes)

    def is_complete(self, found: Found) -> bool:
        """Return whether every shard has the size that the manifest says; asks for each."""
        files = found.manifest.files if found.manifest else {}
        return bool(found.manifest) and all(
            self._size(f"{found.commit.folder}/{name}") == file.bytes
            for name, file in files.items()
        )

    def _is_void(self, commit: Commit) -> bool:
        try:
            return is_void(self.store.read(commit.manifest_key))
        except FileNotFoundError:  # deleted meanwhile
            return True

    def _modified_s(self, key: str) -> float | None:
        try:
            return self.store.modified_s(key)
        except FileNotFoundError:  # deleted meanwhile
            return None

    def _size(self, key: str) -> int:
        try:
            return self.store.size(key)
        except FileNotFoundError:  # deleted meanwhile, or parts of an upload
            return 0


def open_place(url: str, settings: ObjectStore = ObjectStore()) -> Place:  # noqa: B008 (frozen)
    """Open a run's directory, a folder of checkpoints, or the folder of one. Changes nothing.

    Raises:
        ConfigError: it is none of these; says what it is.
    """
    url = url.removesuffix(f"/{MANIFEST}")
    url = url.rstrip("/") or "/"
    store = open_store(url, settings)
    names = store.entries("")
    if MANIFEST in names:
        parent, folder = split(url, settings)
        return Place(url, parent, [folder], is_one=True)
    inner = store.entries(FOLDER) if f"{FOLDER}/" in names else []
    if "attempts/" in names or any(parse_folder(name.rstrip("/")) for name in inner):
        return Place(url, store)
    if any(parse_folder(name.rstrip("/")) for name in names) and Path(url).resolve().name == FOLDER:
        above, _ = split(url, settings)  # its attempts decide which of them count
        if "attempts/" in above.entries(""):
            return Place(url, above)
    folders = [name.rstrip("/") for name in names if name.endswith("/")]
    folders = [folder for folder in folders if MANIFEST in store.entries(folder)]
    if folders:
        return Place(url, store, folders)
    from trainer.importing.formats import open_foreign  # with torch's own formats, where needed

    foreign = open_foreign(url, settings)
    if foreign is not None:
        raise ConfigError(
            f"{url}: this is {foreign.kind}; `python -m trainer.checkpoints copy {url} FOLDER` "
            f"brings it into our format, and init.weights={url} begins a run from its weights"
        )
    raise ConfigError(f"{url} {_instead(url, names)}; {_WANTED}")


_WANTED = "give the directory of a run, a checkpoint's folder, or a folder of such folders"


def _instead(url: str, names: Sequence[str]) -> str:
    if names:
        shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        return f"holds no checkpoint (there is {shown})"
    path = Path(url.removeprefix("file://"))
    if not is_local(url) or not path.exists():
        return "does not exist"
    return "is an empty folder" if path.is_dir() else "is no checkpoint"


def split(url: str, settings: ObjectStore = ObjectStore()) -> tuple[Store, str]:  # noqa: B008
    """Return the store that a checkpoint's folder lies in, and the folder's key.

    Raises:
        ConfigError: there is nothing above it.
    """
    if is_local(url):
        path = Path(url.removeprefix("file://"))
        path = path if path.name not in ("", "..") else path.resolve()
        if not path.name:
            raise ConfigError(f"{url}: a checkpoint needs a folder of its own")
        return open_store(str(path.parent), settings), path.name
    parent, _, name = url.rstrip("/").rpartition("/")
    if name in ("", ".", "..") or parent.endswith(":/"):
        raise ConfigError(f"{url}: a checkpoint needs a folder of its own below the bucket")
    return open_store(parent, settings), name


def refuse_others(store: Store, folder: str) -> None:
    """Make sure that a folder which is to be a checkpoint is not the home of others.

    Raises:
        CheckpointError: it is a run, or has checkpoints in it.
    """
    for name in store.entries(folder):
        inner = f"{folder}/{name.rstrip('/')}"
        is_home = name in ("attempts/", f"{FOLDER}/")
        if is_home or (name.endswith("/") and MANIFEST in store.entries(inner)):
            raise CheckpointError(
                f"{store.url}/{folder} has {name} in it, so it is the home of other checkpoints "
                "and cannot be one itself; give a folder of its own"
            )


def numbers(folder: str) -> tuple[int, int]:
    """Return step and attempt as a folder's name says them; the last number in it, and 0."""
    name = folder.rpartition("/")[2]
    digits = re.findall(r"\d+", name)
    return parse_folder(name) or (int(digits[-1][-18:]) if digits else 0, 0)
