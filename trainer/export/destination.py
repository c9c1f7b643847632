"""The destination of an export: a file or folder that appears complete and durable, or never."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.config.schema import ObjectStore
from trainer.core.atomic_file import TEMPORARY, apply_umask, sync
from trainer.core.scratch import scratch_folder
from trainer.errors import ConfigError
from trainer.storage import local_path, open_store
from trainer.storage.transfer import download, upload

_RECORD_SUFFIX = ".json"


def record_path(path: Path) -> Path:
    """Return the path of an export's record, `<export>.json`."""
    return path.with_name(path.name + _RECORD_SUFFIX)


@dataclass(frozen=True)
class Destination:
    """The URL of an export, local or in an object store; its record is stored next to it."""

    url: str
    settings: ObjectStore = ObjectStore()  # noqa: RUF009 (frozen)

    @property
    def name(self) -> str:
        """The last component of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def path(self) -> Path | None:
        """The local path; None in an object store."""
        return local_path(self.url)

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """Yield a path to write to, which does not exist; afterwards, remove what is left there.

        Raises:
            ConfigError: the destination is not writable, or is a folder that is not an export.
        """
        path = self.path
        if path is None:
            with scratch_folder("export") as folder:
                yield Path(folder, self.name)
            return
        if path.is_dir() and not record_path(path).is_file():
            raise ConfigError(
                f"out={path} cannot be written: it is an existing folder and not an export (no "
                f"{record_path(path).name} next to it); choose another name"
            )
        temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
        missing = [folder for folder in path.parents if not folder.exists()]
        try:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                yield temporary
            finally:
                _remove(temporary)
                for parent in missing:
                    with suppress(OSError):  # not empty: it has the export in it
                        parent.rmdir()
        except OSError as error:
            if error.filename is not None and not _concerns(error.filename, path):
                raise
            raise ConfigError(f"out={path} cannot be written: {error.strerror}") from None

    def publish(self, written: Path, record: bytes, *, last_file: str = "") -> None:
        """Move the file or folder to the destination, durably; the record is written after it.

        Args:
            written: the file or folder, at `temporary`.
            record: bytes of its record.
            last_file: file of a folder that is uploaded last.
        """
        path = self.path
        if path is not None:
            apply_umask(files(written))
            _sync(written)
            record_path(path).unlink(missing_ok=True)
            _replace(written, path)
            open_store(str(path.parent)).replace(record_path(path).name, record)
            return
        store = open_store(self.url.rstrip("/").rpartition("/")[0], self.settings)
        store.delete([self.name + _RECORD_SUFFIX])
        store.delete([self.name, *store.list(self.name)])
        relative = sorted(files(written), key=lambda file: file == written / last_file)
        for file in relative:
            key = "/".join([self.name, *file.relative_to(written).parts])
            upload(file, store, key)
        store.replace(self.name + _RECORD_SUFFIX, record)


def files(path: Path) -> list[Path]:
    """Return the file itself, or all files below the folder, sorted."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())


@contextmanager
def local_copy(url: str, settings: ObjectStore) -> Iterator[Path]:
    """Yield the local path of an export, or of a temporary copy with its record if it is remote.

    Raises:
        ConfigError: no such export in the store.
    """
    if (path := local_path(url)) is not None:
        yield path
        return
    parent, _, name = url.rstrip("/").rpartition("/")
    store = open_store(parent, settings)
    with scratch_folder("export") as folder:
        for key in [*(store.list(name) or [name]), name + _RECORD_SUFFIX]:
            try:
                download(store, key, Path(folder, key))
            except FileNotFoundError:
                raise ConfigError(f"{store.url}/{key}: no such export") from None
        yield Path(folder, name)


def _sync(path: Path) -> None:
    """Make a file, or a folder and its content, durable."""
    content = sorted(path.rglob("*"), reverse=True) if path.is_dir() else []  # the deepest first
    for entry in (*content, path):
        sync(entry)


def _replace(new: Path, path: Path) -> None:
    """Rename; an existing folder, which rename(2) cannot replace, is moved aside, then removed."""
    aside = None
    if path.is_dir() or (new.is_dir() and path.exists()):
        aside = path.with_name(f"{TEMPORARY}{os.getpid()}-old-{path.name}")
        path.rename(aside)
    try:
        new.rename(path)
    except OSError:
        if aside is not None:
            aside.rename(path)
        raise
    if aside is not None:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _concerns(filename: object, path: Path) -> bool:
    """Return true if an error's file is at the destination, and not one that the model reads."""
    return str(filename).startswith(str(path.parent)) or str(path).startswith(str(filename))
