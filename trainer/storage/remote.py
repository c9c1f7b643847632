"""Object stores through fsspec, with retries of requests that may succeed later."""

import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, NoReturn, TypeVar

from trainer.config.schema import ObjectStore
from trainer.errors import ConfigError, StoreError, StoreRefusedError
from trainer.storage.direct import CutShortError
from trainer.storage.store import AlreadyExists, positioned

T = TypeVar("T")

PART_BYTES = 8 << 20
_READ_BYTES = 16 << 20
CONNECTIONS = 32
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 20.0
_FOREIGN = ("botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs", "gcsfs", "adlfs")
"""Libraries whose exceptions are caused by the server or the network, not by bugs."""
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_HEAD_REJECTED = "400"
"""The only code in the response to a HEAD, also if the token has expired."""
_EXPIRED |= {_HEAD_REJECTED}
_ADVICE = {
    "AccessDenied": "check the permissions of these credentials on the bucket",
    "403": "check the credentials and their permissions on the bucket",
    "InvalidAccessKeyId": "check the credentials in the environment or the profile",
    "SignatureDoesNotMatch": "check the credentials in the environment or the profile",
    "NoCredentials": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "RequestTimeTooSkewed": "set the clock of this machine, it is minutes off",
    "PermanentRedirect": "set store.region to the bucket's own",
    "NoSuchBucket": "create the bucket, or correct its name",
    **dict.fromkeys(
        _EXPIRED - {_HEAD_REJECTED}, "get new credentials, then run the same command again"
    ),
}


class FsspecStore:
    """Keys as objects below a URL of any fsspec file system.

    Uses only what every fsspec file system has: a new key is held in memory until it is finished,
    and `create` is as atomic as `pipe_file(mode="create")` is there.
    """

    read_bytes = _READ_BYTES
    part_bytes = PART_BYTES

    def __init__(self, url: str, settings: ObjectStore) -> None:
        self.url = url.rstrip("/")
        self._settings = settings
        self._connecting = threading.Lock()
        self._connect()

    def _connect(self) -> None:
        import fsspec

        protocol = self.url.partition("://")[0]
        try:
            kind = fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            extra = "; pip install 'perdure[s3]'" if protocol.startswith("s3") else ""
            raise ConfigError(f"{self.url}: {error}{extra}") from None
        except ValueError:
            raise ConfigError(f"{self.url}: {protocol!r} is not a protocol of fsspec") from None
        self._fs = kind(**self._options())
        self._root = kind._strip_protocol(self.url).rstrip("/")

    def _options(self) -> dict[str, Any]:
        return {"use_listings_cache": False, **self._settings.options}

    # --- the contract ----------------------------------------------------------------------------

    def write(self, key: str, total_bytes: int, parts: Iterable[memoryview]) -> None:
        """Collect all parts in memory, then put them in one request."""
        self._check_absent(key)
        self.replace(key, b"".join(part for _, part in positioned(parts, total_bytes)))

    def create(self, key: str, data: bytes) -> None:
        """Put it on the condition that the key does not exist."""
        path = self._path(key)
        try:
            with _CREATING:
                self._try("create", key, lambda: self._fs.pipe_file(path, data, mode="create"))
        except FileExistsError:
            self._accept_own(key, data)

    def replace(self, key: str, data: bytes) -> None:
        """Put it unconditionally."""
        path = self._path(key)
        self._try("replace", key, lambda: self._fs.pipe_file(path, data))

    def read(self, key: str) -> bytes:
        """Get the object."""
        path = self._path(key)
        data: bytes = self._try("read", key, lambda: self._fs.cat_file(path), may_be_missing=True)
        return data

    def read_into(
        self, key: str, start: int, buffer: memoryview, *, is_shared: bool = False
    ) -> int:
        """Get one range; retry a truncated response."""
        if not len(buffer):
            return 0
        view = buffer.cast("B")

        def get() -> int:
            data = self._range(key, start, start + len(view))
            if len(data) < len(view) and start + len(data) < self.size(key):
                raise CutShortError(f"{len(data):,} of {len(view):,} bytes")
            view[: len(data)] = data
            return len(data)

        return self._try("read", key, get, may_be_missing=True)

    def size(self, key: str) -> int:
        """Ask for the object's size."""
        path = self._path(key)
        return int(self._try("look at", key, lambda: self._fs.size(path), may_be_missing=True))

    def entries(self, folder: str) -> list[str]:
        """List one level, with no cache."""
        path = self._path(folder)
        ask = partial(self._fs.ls, path, detail=True)
        try:
            items: list[Any] = self._try("list", folder, ask, may_be_missing=True)
        except FileNotFoundError:
            return []
        top = path.strip("/")
        return sorted(
            item["name"].rstrip("/").rpartition("/")[2] + "/" * (item["type"] == "directory")
            for item in items
            if item["name"].strip("/") != top
        )

    def list(self, prefix: str, *, unfinished: bool = False) -> list[str]:
        """List by prefix, with no cache."""
        path = self._path(prefix)
        paths = self._try("list", prefix, lambda: list(self._fs.find(path)))
        return sorted(name.removeprefix(self._root).lstrip("/") for name in paths)

    def modified_s(self, key: str) -> float:
        """Ask for the object's time of modification."""
        ask = partial(self._fs.modified, self._path(key))
        modified: datetime = self._try("look at", key, ask, may_be_missing=True)
        return modified.timestamp()

    def delete(self, keys: Iterable[str]) -> None:
        """Delete one after another."""
        for key in keys:
            remove = partial(self._fs.rm_file, self._path(key))
            with suppress(FileNotFoundError):
                self._try("delete", key, remove, may_be_missing=True)

    def probe(self) -> str:
        """Create and delete a small object, and send a part; check a second creation fails."""
        key = f".tmp-probe-{secrets.token_hex(4)}"
        self._probe_part(f"{key}-part")
        self.create(key, b"probe")
        try:
            is_safe = self._has_conditional_create(key)
        finally:
            self.delete([key])
        if is_safe:
            return ""
        return (
            f"{self.url} does not support conditional create: two jobs started on the same run at "
            "once could overwrite each other's commits; start only one"
        )

    def _probe_part(self, key: str) -> None:
        """Start a new key as a save does, send one part, and discard it."""

        def parts() -> Iterator[memoryview]:
            yield memoryview(bytes(self.part_bytes))
            raise _Discard

        with suppress(_Discard):
            self.write(key, self.part_bytes + 1, parts())

    def _has_conditional_create(self, key: str) -> bool:
        """Return whether the store itself rejects creating this existing key."""
        return False

    # --- requests ------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        if key.startswith("/") or ".." in key.split("/"):
            raise ValueError(f"{key!r} is not a key")
        return f"{self._root}/{key}" if key else self._root

    def _range(self, key: str, start: int, stop: int) -> bytes:
        data: bytes = self._fs.cat_file(self._path(key), start=start, end=stop)
        return data

    def _check_absent(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self.size(key)
            raise AlreadyExists(f"{self.url}/{key} exists already")

    def _accept_own(self, key: str, data: bytes) -> None:
        """Succeed if the key has our bytes, because only the response was lost; else raise."""
        with suppress(FileNotFoundError):
            if self.read(key) == data:
                return
        raise AlreadyExists(f"{self.url}/{key} exists already")

    def _try(self, verb: str, key: str, do: Callable[[], T], *, may_be_missing: bool = False) -> T:
        """Call `do` with retries and equal jitter (Brooker 2015)."""
        began, tries = time.monotonic(), self._settings.retries + 1
        for number in range(tries):
            try:
                return do()
            except FileExistsError:
                raise
            except Exception as error:
                missing = (
                    isinstance(error, FileNotFoundError) and error_code(error) != "NoSuchBucket"
                )
                if missing and may_be_missing:
                    raise FileNotFoundError(f"{self.url}/{key}") from None
                is_external = isinstance(error, OSError | TimeoutError) or type(
                    error
                ).__module__.startswith(_FOREIGN)
                if not is_external:
                    raise
                if missing or not _may_succeed(error) or number + 1 == tries:
                    self._raise(verb, key, error, number + 1, time.monotonic() - began)
                if error_code(error) in _EXPIRED:
                    with self._connecting:
                        self._connect()  # the environment or profile may have new credentials
            longest_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**number)
            time.sleep(_JITTER.uniform(longest_s / 2, longest_s))
        raise AssertionError

    def _raise(self, verb: str, key: str, error: Exception, tries: int, seconds: float) -> NoReturn:
        code = error_code(error)
        is_refused = _is_refused(error)
        default = (
            "the server would reject it again: check the bucket's policy and the store.* settings"
            if is_refused
            else "check the server and the network, then run the command again"
        )
        advice = _ADVICE.get(code, default)
        often = f" ({tries} tries in {seconds:.0f} s)" if tries > 1 else ""
        message = self._without_secrets(f"{type(error).__name__}: {error}"[:500])
        location = f"{self.url}/{key}" if key else self.url
        kind = StoreRefusedError if is_refused else StoreError
        raise kind(f"cannot {verb} {location}: {message}{often}; {advice}") from None

    def _without_secrets(self, text: str) -> str:
        secrets_ = {os.environ.get(name) for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")}
        secrets_ |= set(_strings(self._settings.options))
        for secret in secrets_:
            if secret and len(secret) > 3:
                text = text.replace(secret, "***")
        return text


class _Discard(Exception):
    """Ends a write on purpose."""


_JITTER = random.SystemRandom()
"""Own generator: the global one belongs to the training, and is in every checkpoint."""
_CREATING = threading.Lock()
"""Lock for file systems without conditional create, which check first and then write."""


def error_code(error: BaseException | None) -> str:
    """Return the server's code for an error, as `NoSuchKey` or `503`, or an empty text."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            return "NoCredentials"
        error = error.__cause__
    return ""


def _status(error: BaseException | None) -> int:
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        for name in ("status", "status_code", "code"):  # of aiohttp, Azure and Google Cloud
            status = getattr(error, name, None)
            if isinstance(status, int) and 400 <= status < 600:
                return status
        error = error.__cause__
    return 0


def _may_succeed(error: Exception) -> bool:
    """Return whether a retry may succeed: RFC 9110's 5xx, 408, 409, 429, or no response."""
    code, status = error_code(error), _status(error)
    if code in _EXPIRED:
        return True
    if code in ("NoCredentials", "RequestTimeTooSkewed", "NotImplemented"):
        return False
    if status:
        is_corrupted = code in ("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch")
        is_temporary = status >= 500 or status in (408, 409, 429) or code == "RequestTimeout"
        return is_temporary or is_corrupted
    return not isinstance(error, PermissionError | FileNotFoundError)


def _is_refused(error: Exception) -> bool:
    """Return whether an error after the last retry would come again."""
    if isinstance(error, FileNotFoundError):
        return True
    return not _may_succeed(error) or error_code(error) == _HEAD_REJECTED


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
