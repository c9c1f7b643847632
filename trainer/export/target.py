"""Where an export goes: a file or folder that appears whole and durable, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.config.schema import ObjectStore
from trainer.core.atomic_file import TEMPORARY, sync
from trainer.errors import ConfigError
from trainer.export.formats import RECORD_SUFFIX, record_path
from trainer.storage import local_path, open_store
from trainer.storage.transfer import upload


@dataclass(frozen=True)
class Target:
    """A place for one export and its record: `out=`, local or in an object store."""

    url: str
    settings: ObjectStore = ObjectStore()  # noqa: RUF009 (frozen)

    @property
    def name(self) -> str:
        """The last part of the place's name."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def path(self) -> Path | None:
        """Where it is on this machine, None in an object store."""
        return local_path(self.url)

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """Give a path to write to, with nothing there; what is left at it afterwards is removed.

        Raises:
            ConfigError: the place cannot be written to, or holds what is not to be replaced.
        """
        path = self.path
        if path is None:
            with tempfile.TemporaryDirectory(prefix="perdure-") as folder:
                yield Path(folder, self.name)
            return
        if path.is_dir() and not record_path(path).is_file():
            raise ConfigError(
                f"out={path} cannot be written: it is a folder, and not one that an export wrote "
                f"({record_path(path).name} would be beside it); choose another name"
            )
        here = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
        missing = [folder for folder in path.parents if not folder.exists()]
        try:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                yield here
            finally:
                _remove(here)
                for each in missing:
                    with suppress(OSError):  # it has what was exported in it
                        each.rmdir()
        except OSError as error:
            if error.filename is not None and not _is_of(error.filename, path):
                raise
            raise ConfigError(f"out={path} cannot be written: {error.strerror}") from None

    def publish(self, written: Path, record: bytes, *, last: str = "") -> None:
        """Move what was written to its place, durably; the record appears after it.

        Args:
            written: the file or folder, at `temporary`.
            record: bytes of the file that describes it.
            last: name of the file of a folder that an object store gets last.
        """
        _sync(written)
        path = self.path
        if path is not None:
            record_path(path).unlink(missing_ok=True)
            _replace(written, path)
            open_store(str(path.parent)).replace(record_path(path).name, record)
            return
        store = open_store(self.url.rstrip("/").rpartition("/")[0], self.settings)
        store.delete([self.name + RECORD_SUFFIX])
        store.delete([self.name, *store.list(self.name)])
        for key, file in _in_order(written, self.name, last):
            upload(file, store, key)
        store.replace(self.name + RECORD_SUFFIX, record)


def _in_order(written: Path, name: str, last: str) -> list[tuple[str, Path]]:
    if written.is_file():
        return [(name, written)]
    found = [(str(file.relative_to(written)), file) for file in files(written)]
    found.sort(key=lambda each: (each[0] == last, each[0]))
    return [(f"{name}/{key}", file) for key, file in found]


def files(path: Path) -> list[Path]:
    """Return the file, or all files below the folder, sorted."""
    if path.is_file():
        return [path]
    return sorted(each for each in path.rglob("*") if each.is_file())


def _sync(path: Path) -> None:
    """Make a file, or a folder with everything in it, durable."""
    inner = sorted(path.rglob("*"), reverse=True) if path.is_dir() else []  # the deepest first
    for each in (*inner, path):
        sync(each)


def _replace(new: Path, path: Path) -> None:
    """Rename; a folder, which rename(2) does not replace, is put aside before and removed after."""
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


def _is_of(filename: object, path: Path) -> bool:
    """Whether an error is about this place, and not about some file that the model needs."""
    return str(filename).startswith(str(path.parent)) or str(path).startswith(str(filename))
