"""A directory as a store: fsync of files and folders, publication by link and rename."""

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import StoreError
from trainer.storage.store import AlreadyExists

_TEMPORARY = ".tmp-"


class LocalStore:
    """Keys as files below a directory of a local or shared POSIX file system."""

    def __init__(self, root: str | Path) -> None:
        self.url = str(root)
        self._root = Path(root)

    def write(self, key: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a new file and fsync it and its folder."""
        path = self._path(key)
        with _store_errors("write", path):
            self._make_folder(path.parent)
            try:
                with open(path, "xb", buffering=0) as file:
                    for chunk in chunks:
                        _write_all(file.fileno(), chunk)
                    os.fsync(file.fileno())
            except FileExistsError:
                raise AlreadyExists(f"{path} exists already") from None
            _sync_folder(path.parent)

    def create(self, key: str, data: bytes) -> None:
        """Publish by link(2), which never replaces; NFS may answer EEXIST after its own success."""
        path = self._path(key)
        with _store_errors("create", path):
            temporary = self._write_temporary(path, data)
            try:
                os.link(temporary, path)
            except FileExistsError:
                if path.read_bytes() != data:
                    raise AlreadyExists(f"{path} exists already") from None
            finally:
                os.unlink(temporary)
            _sync_folder(path.parent)

    def replace(self, key: str, data: bytes) -> None:
        """Publish by rename(2)."""
        path = self._path(key)
        with _store_errors("replace", path):
            temporary = self._write_temporary(path, data)
            try:
                os.rename(temporary, path)
            except OSError:
                os.unlink(temporary)
                raise
            _sync_folder(path.parent)

    def read(self, key: str) -> bytes:
        """Return the whole file."""
        path = self._path(key)
        with _store_errors("read", path, may_be_missing=True):
            return path.read_bytes()

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        """Read one range; short only at the end of the file."""
        path = self._path(key)
        with (
            _store_errors("read", path, may_be_missing=True),
            open(path, "rb", buffering=0) as file,
        ):
            done = 0
            while done < len(buffer):
                count = os.preadv(file.fileno(), [buffer[done:]], start + done)
                if count == 0:
                    break
                done += count
            return done

    def size(self, key: str) -> int:
        """Return the file's size."""
        path = self._path(key)
        with _store_errors("look at", path, may_be_missing=True):
            return path.stat().st_size

    def list(self, prefix: str) -> list[str]:
        """Walk the folder; files that `create` and `replace` have not published are left out."""
        found = []
        top = self._path(prefix)
        with _store_errors("list", top):
            for folder, _, names in os.walk(top, onerror=_raise_unless_missing):
                relative = Path(folder).relative_to(self._root)
                found += [str(relative / n) for n in names if not n.startswith(_TEMPORARY)]
        return sorted(found)

    def delete(self, keys: Iterable[str]) -> None:
        """Unlink, fsync the folder after each run of keys in it, and remove it when empty."""
        folder: Path | None = None
        with _store_errors("delete in", self._root):
            for key in keys:
                path = self._path(key)
                if folder is not None and path.parent != folder:
                    self._leave(folder)
                folder = path.parent
                path.unlink(missing_ok=True)
            if folder is not None:
                self._leave(folder)

    def probe(self) -> None:
        """Create the directory, write a small file, delete it."""
        key = f"{_TEMPORARY}probe-{secrets.token_hex(4)}"
        self.write(key, [b"probe"])
        self.delete([key])

    def _path(self, key: str) -> Path:
        if key.startswith("/") or ".." in key.split("/"):
            raise ValueError(f"{key!r} is not a key")
        return self._root / key

    def _make_folder(self, folder: Path) -> None:
        """Create a folder with its parents, each made durable in its own parent."""
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        _sync_folder(folder.parent)

    def _write_temporary(self, path: Path, data: bytes) -> Path:
        self._make_folder(path.parent)
        temporary = path.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            with open(temporary, "xb", buffering=0) as file:
                _write_all(file.fileno(), data)
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    def _leave(self, folder: Path) -> None:
        if folder == self._root or not folder.is_dir():
            return
        _sync_folder(folder)
        if not any(folder.iterdir()):
            folder.rmdir()
            _sync_folder(folder.parent)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


@contextmanager
def _store_errors(verb: str, path: Path, *, may_be_missing: bool = False) -> Iterator[None]:
    """Turn an OSError into a StoreError with the path; where one reads, a missing file stays so."""
    try:
        yield
    except OSError as error:
        if may_be_missing and isinstance(error, FileNotFoundError):
            raise
        name = errno.errorcode.get(error.errno or 0, "")
        advice = {
            "ENOSPC": "free some space, or lower checkpoint.keep_last",
            "EDQUOT": "free some of your quota, or lower checkpoint.keep_last",
            "EACCES": "check who owns it and its rights",
            "EPERM": "check who owns it and its rights",
            "EROFS": "choose a run_dir that is not mounted read-only",
            "ENOTDIR": "a file stands where a folder is needed; choose another run_dir",
        }.get(name, "check the file system, then run the same command again")
        raise StoreError(f"cannot {verb} {path}: {error.strerror} ({name}); {advice}") from error
