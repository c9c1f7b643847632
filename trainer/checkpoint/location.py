"""Checkpoint locations: a run directory, a folder of checkpoints, or one checkpoint folder."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import FOLDER, MANIFEST, Commit
from trainer.checkpoint.manifest import Manifest, parse_folder
from trainer.checkpoint.replicas import Replicas, Survey
from trainer.config.schema import ObjectStore
from trainer.errors import CheckpointError, ConfigError
from trainer.storage import Store, local_path, open_store

if TYPE_CHECKING:
    from trainer.checkpoint.reader import Reader


class Location:
    """A path with checkpoints.

    Args:
        url: the path as typed.
        store: the store that has the checkpoints.
        folders: their keys; None: those of a run, filtered by its attempt records.
        is_one: the path is the folder of one checkpoint.
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
        self.folders = folders

    @property
    def is_run(self) -> bool:
        """Return whether the path is a run directory."""
        return self.folders is None

    def survey(self) -> Survey:
        """Return the committed checkpoints, for `select`.

        Raises:
            CheckpointError: outside of a run: every manifest is damaged.
        """
        if self.folders is None:
            return Replicas(self.store).survey()
        commits, errors = [], []
        for folder in self.folders:
            try:
                manifest = lineage.manifest_in(self.store, folder)
            except CheckpointError as error:
                errors.append(error)
            else:
                commits.append(Commit(manifest.step, manifest.attempt, folder))
        if errors and not commits:
            raise errors[0]
        return Survey([self.store], [], [commits], [commits])

    def manifest(self, commit: Commit) -> Manifest:
        """Read and validate a manifest.

        Raises:
            CheckpointError: the manifest is damaged, void, deleted, or of another version or step.
        """
        return lineage.read_manifest(self.store, commit)

    def reader(self, commit: Commit) -> "Reader":
        """Return a reader of a checkpoint's tensors."""
        from trainer.checkpoint.reader import Reader  # imports torch

        return Reader(self.store, commit.folder, self.manifest(commit))

    def in_run(self, settings: ObjectStore) -> "Location":
        """Return a run's checkpoint folder as seen from its run directory; other locations as is.

        The run directory has the attempt records.
        """
        name = self.folders[0] if self.is_one and self.folders else ""
        if not parse_folder(name) or Path(self.store.url).name != FOLDER:
            return self
        run = self.store.url.rstrip("/").removesuffix(FOLDER)
        run = run if run.endswith(":///") or run == "/" else run.rstrip("/") or "."
        return Location(self.url, open_store(run, settings), [f"{FOLDER}/{name}"], is_one=True)


def find_location(
    url: str,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
) -> Location | None:
    """Open a run directory, a folder of checkpoints, one checkpoint folder or its manifest.

    Returns:
        The location, or None if the path is none of these. Changes nothing.
    """
    url = url.removesuffix(f"/{MANIFEST}").rstrip("/") or "/"
    store = open_store(url, settings)
    names = store.entries("")
    if MANIFEST in names:
        parent, folder = split(url, settings)
        return Location(url, parent, [folder], is_one=True)
    subfolders = store.entries(FOLDER) if f"{FOLDER}/" in names else []
    if "attempts/" in names or any(parse_folder(name.rstrip("/")) for name in subfolders):
        return Location(url, store)
    if any(parse_folder(name.rstrip("/")) for name in names) and Path(url).resolve().name == FOLDER:
        run, _ = split(url, settings)
        if "attempts/" in run.entries(""):
            return Location(url, run)
    folders = [name.rstrip("/") for name in names if name.endswith("/")]
    folders = [folder for folder in folders if MANIFEST in store.entries(folder)]
    return Location(url, store, folders) if folders else None


def open_location(
    url: str,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
) -> Location:
    """Open a run directory, a folder of checkpoints, one checkpoint folder or its manifest.

    Raises:
        ConfigError: the path is none of these.
    """
    location = find_location(url, settings)
    if location is None:
        raise ConfigError(
            f"{url} {_contents(url, settings)}; pass a run directory, a checkpoint folder, or a "
            "folder of checkpoint folders"
        )
    return location


def _contents(url: str, settings: ObjectStore) -> str:
    if names := open_store(url, settings).entries(""):
        listed = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        return f"has no checkpoint (entries: {listed})"
    path = local_path(url)
    if path is None or not path.exists():
        return "does not exist"
    return "is an empty folder" if path.is_dir() else "is not a checkpoint"


def split(url: str, settings: ObjectStore = ObjectStore()) -> tuple[Store, str]:  # noqa: B008
    """Return the store above a checkpoint folder, and the folder's key in it.

    Raises:
        ConfigError: the path has no parent.
    """
    if (path := local_path(url)) is not None:
        path = path if path.name not in ("", "..") else path.resolve()
        if not path.name:
            raise ConfigError(f"{url}: a checkpoint needs a folder below the root")
        return open_store(str(path.parent), settings), path.name
    parent, _, name = url.rstrip("/").rpartition("/")
    if name in ("", ".", "..") or parent.endswith(":/"):
        raise ConfigError(f"{url}: a checkpoint needs a folder below the bucket")
    return open_store(parent, settings), name


def check_no_checkpoints_inside(store: Store, folder: str) -> None:
    """Check that a folder that is to become a checkpoint is not a run or a folder of checkpoints.

    Raises:
        CheckpointError: it is.
    """
    for name in store.entries(folder):
        is_run = name in ("attempts/", f"{FOLDER}/")
        if is_run or (
            name.endswith("/") and MANIFEST in store.entries(f"{folder}/{name.rstrip('/')}")
        ):
            raise CheckpointError(
                f"{store.url}/{folder} contains {name}, so it holds other checkpoints and cannot "
                "become one; choose another folder"
            )


def numbers(folder: str) -> tuple[int, int]:
    """Return the step and attempt in a folder's name; else the last number in it, and 0."""
    name = folder.rpartition("/")[2]
    digits = re.findall(r"\d+", name)
    return parse_folder(name) or (int(digits[-1][-18:]) if digits else 0, 0)
