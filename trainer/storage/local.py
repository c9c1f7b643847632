"""Store in a directory: direct I/O, fsync of files and folders, publication by link or rename.

Large parts bypass the page cache (open(2), O_DIRECT) if the file system supports it: the cache
would cost a copy, and evict the training data.
"""

import ctypes
import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.core.atomic_file import TEMPORARY, sync
from trainer.core.threads import in_parallel
from trainer.errors import StoreError, StoreRefusedError
from trainer.storage.store import AlreadyExists, positioned

_PAGE_BYTES = 4096
_THREADS = 8
"""Parts in flight: a queue depth that saturates disks."""
_DIRECT_READ_BYTES = 1 << 16
"""Smaller reads go through the page cache, whose read-ahead serves the next one."""
_PERMANENT = (
    "EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "ENOENT", "EEXIST", "ENAMETOOLONG", "ELOOP",
    "EFBIG", "EINVAL", "EOPNOTSUPP", "ENOSYS",
)  # fmt: skip
"""Errors that do not pass without a change of rights, mounts or names."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)
"""Errors of link(2) and renameat2(2) on file systems without them."""
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_NO_DIRECT = (errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP)


class LocalStore:
    """Keys as files below a directory of a local or shared POSIX file system."""

    read_bytes = 4 << 20
    part_bytes = 4 << 20

    def __init__(self, root: str | Path) -> None:
        self.url = str(root)
        self._root = Path(root)
        self._is_atomic = True  # until a file could only be published by O_EXCL

    def write(self, key: str, total_bytes: int, parts: Iterable[memoryview]) -> None:
        """Write several parts at a time, then fsync the file and its folder."""
        file = self._new_file(key, total_bytes)
        try:
            count = min(_THREADS, -(-total_bytes // self.part_bytes))
            in_parallel(file.put, positioned(parts, total_bytes), count)
            file.finish()
        except BaseException:
            file.abort()
            raise

    def _new_file(self, key: str, total_bytes: int) -> "_NewFile":
        """Create the file and allocate its blocks, so that a full disk is detected at once."""
        path = self._path(key)
        with _store_errors("write", path):
            self._make_folder(path.parent)
            free = os.statvfs(path.parent)
            free_bytes = free.f_bavail * free.f_frsize
            if free_bytes < total_bytes:
                raise StoreError(
                    f"cannot write {path}: it needs {total_bytes:,} bytes, {free_bytes:,} are "
                    "free; free some space, or lower checkpoint.keep_last"
                )
            try:
                return _NewFile(path, total_bytes)
            except FileExistsError:
                raise AlreadyExists(f"{path} exists already") from None

    def create(self, key: str, data: bytes) -> None:
        """Publish without replacing; NFS may answer EEXIST after its own success."""
        path = self._path(key)
        with _store_errors("create", path):
            temporary = self._write_temporary(path, data)
            try:
                self._publish(temporary, path, data)
            except FileExistsError:
                if path.read_bytes() != data:
                    raise AlreadyExists(f"{path} exists already") from None
            finally:
                temporary.unlink(missing_ok=True)
            sync(path.parent)

    def _publish(self, temporary: Path, path: Path, data: bytes) -> None:
        """Give a complete file its name, which must be free.

        link(2) and renameat2(2) do so at once. Without both (FAT, some SMB and FUSE mounts), the
        name is created exclusively and then written: of two processes one succeeds, but a process
        killed in between leaves a truncated file. Readers detect that by the checksum.
        """
        try:
            os.link(temporary, path)
            return
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise OSError(error.errno, f"hard link: {error.strerror}") from error
        try:
            _rename_to_new(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._is_atomic = False
            _write_new(path, data)

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
            sync(path.parent)

    def read(self, key: str) -> bytes:
        """Return the file's content."""
        path = self._path(key)
        with _store_errors("read", path, may_be_missing=True):
            return path.read_bytes()

    def read_into(
        self, key: str, start: int, buffer: memoryview, *, is_shared: bool = False
    ) -> int:
        """Read one range, with direct I/O if aligned to pages; short only at the file's end."""
        path = self._path(key)
        with _store_errors("read", path, may_be_missing=True):
            done = 0
            is_large = len(buffer) >= _DIRECT_READ_BYTES
            if is_large and not is_shared and _on_pages(start, buffer):
                done = _read_directly(path, start, buffer)
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if is_large and done == 0:  # read ahead the entire range, not window by window
                    os.posix_fadvise(descriptor, start, len(buffer), os.POSIX_FADV_WILLNEED)
                while done < len(buffer):
                    count = os.preadv(descriptor, [buffer[done:]], start + done)
                    if count == 0:
                        break
                    done += count
            finally:
                os.close(descriptor)
            return done

    def size(self, key: str) -> int:
        """Return the file's size."""
        path = self._path(key)
        with _store_errors("look at", path, may_be_missing=True):
            return path.stat().st_size

    def entries(self, folder: str) -> list[str]:
        """Read one directory."""
        path = self._path(folder)
        with _store_errors("list", path):
            if not path.is_dir():
                return []
            with os.scandir(path) as items:
                names = [entry.name + "/" * os.path.isdir(entry.path) for entry in items]
        return sorted(name for name in names if not name.startswith(TEMPORARY))

    def list(self, prefix: str, *, unfinished: bool = False) -> list[str]:
        """Walk the folder; files that `create` and `replace` have not published are left out.

        Shards that are being written are listed, and so are folders behind symbolic links.
        """
        keys: list[str] = []
        top = self._path(prefix)
        with _store_errors("list", top):
            walk = os.walk(top, onerror=_raise_unless_missing, followlinks=True)
            for folder, folders, names in walk:
                folders[:] = [name for name in folders if not _is_loop(folder, name)]
                relative = Path(folder).relative_to(self._root)
                keys += [str(relative / n) for n in names if not n.startswith(TEMPORARY)]
        return sorted(keys)

    def modified_s(self, key: str) -> float:
        """Return the file's time of modification."""
        path = self._path(key)
        with _store_errors("look at", path, may_be_missing=True):
            return path.stat().st_mtime

    def delete(self, keys: Iterable[str]) -> None:
        """Unlink, fsync the folder after each run of keys in it, and remove it when empty.

        Unpublished temporary files of killed processes are deleted with the folder.
        """
        folder: Path | None = None
        with _store_errors("delete in", self._root):
            for key in keys:
                path = self._path(key)
                if folder is not None and path.parent != folder:
                    self._sync_or_remove(folder)
                folder = path.parent
                path.unlink(missing_ok=True)
            if folder is not None:
                self._sync_or_remove(folder)

    def probe(self) -> str:
        """Create the directory, write a small file, delete it."""
        key = f"{TEMPORARY}probe-{secrets.token_hex(4)}"
        self.create(key, b"probe")
        self.delete([key])
        if self._is_atomic:
            return ""
        return (
            f"the file system of {self._root} supports neither hard links nor exclusive renames. "
            "Two jobs still cannot commit the same checkpoint, but a job killed while committing "
            "leaves a damaged one, which is skipped"
        )

    def _path(self, key: str) -> Path:
        if key.startswith("/") or ".." in key.split("/"):
            raise ValueError(f"{key!r} is not a key")
        return self._root / key

    def _make_folder(self, folder: Path) -> None:
        """Create a folder and its parents, each durable in its parent."""
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        sync(folder.parent)

    def _write_temporary(self, path: Path, data: bytes) -> Path:
        self._make_folder(path.parent)
        temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            with open(temporary, "xb", buffering=0) as file:
                _write_all(file.fileno(), data)
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    def _sync_or_remove(self, folder: Path) -> None:
        if folder == self._root or not folder.is_dir():
            return
        sync(folder)
        paths = list(folder.iterdir())
        if all(path.name.startswith(TEMPORARY) for path in paths):
            for path in paths:
                path.unlink(missing_ok=True)
            folder.resolve().rmdir()
            if folder.is_symlink():
                folder.unlink()
            sync(folder.parent)


class _NewFile:
    """A file with two descriptors: direct I/O for full pages, buffered I/O for the rest."""

    def __init__(self, path: Path, total_bytes: int) -> None:
        self._path = path
        self._direct: int | None = None
        flags = os.O_WRONLY | os.O_CLOEXEC
        self._plain = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _allocate(self._plain, total_bytes)
            with suppress(OSError):  # EINVAL: no direct I/O on this file system
                self._direct = os.open(path, flags | os.O_DIRECT)
        except BaseException:
            self.abort()
            raise
        self._use_direct = self._direct is not None

    def put(self, part: tuple[int, memoryview]) -> None:
        start, view = part
        end = start + len(view)
        with _store_errors("write", self._path):
            page_bytes = len(view) // _PAGE_BYTES * _PAGE_BYTES
            if self._use_direct and page_bytes and _on_pages(start, view[:page_bytes]):
                start += self._put_directly(start, view[:page_bytes])
            _write_all(self._plain, view[len(view) - (end - start) :], start)

    def _put_directly(self, start: int, view: memoryview) -> int:
        """Write with direct I/O; return the number of bytes. The rest goes to `_plain`."""
        assert self._direct is not None  # noqa: S101 (for the type checker)
        done = 0
        try:
            while done < len(view) and done % _PAGE_BYTES == 0:
                done += os.pwrite(self._direct, view[done:], start + done)
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
            self._use_direct = False  # the file system accepts the flag but not the write
        return done

    def finish(self) -> None:
        with _store_errors("write", self._path):
            os.fsync(self._plain)
            self._close()
            sync(self._path.parent)

    def abort(self) -> None:
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        plain, self._plain = self._plain, -1
        direct, self._direct = self._direct, None
        if direct is not None:
            os.close(direct)
        if plain >= 0:
            os.close(plain)


def _allocate(descriptor: int, total_bytes: int) -> None:
    """Reserve the blocks of a file; if the file system cannot, set its size.

    fallocate(2) itself: posix_fallocate(3) would write to every block instead.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    long_long = ctypes.c_longlong
    if total_bytes and libc.fallocate(descriptor, 0, long_long(0), long_long(total_bytes)):
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, os.strerror(number))
        os.ftruncate(descriptor, total_bytes)


def _rename_to_new(old: Path, new: Path) -> None:
    """Rename a file unless the new name exists: renameat2(2) with RENAME_NOREPLACE."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = (_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new))
    if libc.renameat2(*paths, _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(new))


def _write_new(path: Path, data: bytes) -> None:
    with open(path, "xb", buffering=0) as file:
        _write_all(file.fileno(), data)
        os.fsync(file.fileno())


def _on_pages(start: int, view: memoryview) -> bool:
    """Return whether a range of a file and its buffer are both aligned to pages."""
    import numpy as np  # slow to import, and only writes and large reads need it

    address = np.frombuffer(view, np.uint8).ctypes.data
    return (start | address | len(view)) % _PAGE_BYTES == 0


def _read_directly(path: Path, start: int, buffer: memoryview) -> int:
    """Read with direct I/O; return the number of bytes, 0 if it is not supported."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno not in _NO_DIRECT:
            raise
        return 0
    done = 0
    try:
        while done < len(buffer) and done % _PAGE_BYTES == 0:
            count = os.preadv(descriptor, [buffer[done:]], start + done)
            if count == 0:
                break
            done += count
    except OSError as error:
        if error.errno not in _NO_DIRECT:
            raise
    finally:
        os.close(descriptor)
    return done


def _write_all(descriptor: int, data: bytes | memoryview, start: int = 0) -> None:
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(descriptor, view, start)
        view, start = view[count:], start + count


def _is_loop(folder: str, name: str) -> bool:
    """Return whether a subfolder is a symbolic link to a folder that contains it."""
    path = Path(folder, name)
    if not path.is_symlink():
        return False
    target = path.resolve()
    here = Path(folder).resolve()
    return target == here or target in here.parents


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


@contextmanager
def _store_errors(verb: str, path: Path, *, may_be_missing: bool = False) -> Iterator[None]:
    """Turn an OSError into a StoreError with the path; a read keeps FileNotFoundError."""
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
            "ENOTDIR": "a file is in the way of a folder; choose another run_dir",
        }.get(name, "check the file system, then run the same command again")
        kind = StoreRefusedError if name in _PERMANENT else StoreError
        raise kind(f"cannot {verb} {path}: {error.strerror} ({name}); {advice}") from error
