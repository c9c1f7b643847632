"""Objects as a store, through fsspec; on S3 in parts, with conditional creation and every request
repeated that may succeed the next time.

Amazon S3 API: PutObject with If-None-Match, CreateMultipartUpload, UploadPart, ListObjectsV2.
"""

import base64
import os
import random
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, NoReturn, TypeVar

from trainer.config import ObjectStore
from trainer.errors import ConfigError, StoreError
from trainer.storage.direct import CutShortError, Direct, RefusedError, has_proxy
from trainer.storage.store import AlreadyExists, NewFile

T = TypeVar("T")

_PART_BYTES = 8 << 20
_MAX_PARTS = 10_000
_READ_BYTES = 16 << 20
_CONNECTIONS = 32
_CONNECT_S = 10.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 20.0
_FOREIGN = ("botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs", "gcsfs", "adlfs")
"""Libraries whose exceptions are the server's or the network's, not bugs of ours."""
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_EXPIRED |= {"400"}  # all that the answer to a HEAD says of it
_ADVICE = {
    "AccessDenied": "check the rights of these credentials on the bucket",
    "403": "check the credentials and their rights on the bucket",
    "InvalidAccessKeyId": "check the credentials in the environment or the profile",
    "SignatureDoesNotMatch": "check the credentials in the environment or the profile",
    "NoCredentials": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "RequestTimeTooSkewed": "set the clock of this machine, it is minutes off",
    "PermanentRedirect": "set store.region to the bucket's own",
    "NoSuchBucket": "create the bucket, or correct its name",
    **dict.fromkeys(_EXPIRED, "get new credentials, then run the same command again"),
}


_Uploads = list[tuple[str, str]]
"""Keys in the bucket, and what S3 calls the upload."""


class FsspecStore:
    """Keys as objects below a URL of any fsspec file system.

    Without more knowledge of the file system than fsspec has: a new key is held in memory until it
    is finished, and `create` is as atomic as `pipe_file(mode="create")` there.
    """

    read_bytes = _READ_BYTES

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
            raise ConfigError(f"{self.url}: fsspec knows no protocol {protocol!r}") from None
        self._fs = kind(**self._options())
        self._root = kind._strip_protocol(self.url).rstrip("/")

    def _options(self) -> dict[str, Any]:
        return {"use_listings_cache": False, **self._settings.options}

    # --- the contract ----------------------------------------------------------------------------

    def open_new(self, key: str, total_bytes: int) -> NewFile:
        """Refuse a key that is taken; nothing is sent before the file is finished."""
        self._refuse_taken(key)
        return _HeldFile(self, key, total_bytes)

    def create(self, key: str, data: bytes) -> None:
        """Put it with the condition that nothing is there."""
        path = self._path(key)
        try:
            with _CREATING:
                self._try("create", key, lambda: self._fs.pipe_file(path, data, mode="create"))
        except FileExistsError:
            self._accept_own(key, data)

    def replace(self, key: str, data: bytes) -> None:
        """Put it, whatever is there."""
        path = self._path(key)
        self._try("replace", key, lambda: self._fs.pipe_file(path, data))

    def read(self, key: str) -> bytes:
        """Get the whole object."""
        path = self._path(key)
        data: bytes = self._try("read", key, lambda: self._fs.cat_file(path), may_be_missing=True)
        return data

    def read_into(
        self, key: str, start: int, buffer: memoryview, *, is_shared: bool = False
    ) -> int:
        """Get one range. An answer that is cut short is asked for again."""
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
            found: list[Any] = self._try("list", folder, ask, may_be_missing=True)
        except FileNotFoundError:
            return []
        top = path.strip("/")
        return sorted(
            item["name"].rstrip("/").rpartition("/")[2] + "/" * (item["type"] == "directory")
            for item in found
            if item["name"].strip("/") != top
        )

    def list(self, prefix: str, *, unfinished: bool = False) -> list[str]:
        """List by prefix, with no cache."""
        path = self._path(prefix)
        found = self._try("list", prefix, lambda: list(self._fs.find(path)))
        return sorted(name.removeprefix(self._root).lstrip("/") for name in found)

    def modified_s(self, key: str) -> float:
        """Ask for the object's time of modification."""
        ask = partial(self._fs.modified, self._path(key))
        found: datetime = self._try("look at", key, ask, may_be_missing=True)
        return found.timestamp()

    def delete(self, keys: Iterable[str]) -> None:
        """Delete one after another."""
        for key in keys:
            remove = partial(self._fs.rm_file, self._path(key))
            with suppress(FileNotFoundError):
                self._try("delete", key, remove, may_be_missing=True)

    def probe(self) -> str:
        """Create a small object and delete it; find out whether a second creation is refused."""
        key = f".tmp-probe-{secrets.token_hex(4)}"
        self.create(key, b"probe")
        try:
            is_safe = self._keeps_conditions(key)
        finally:
            self.delete([key])
        if is_safe:
            return ""
        return (
            f"{self.url} lets a key be created that is there already. Two jobs that start on one "
            "run at the same moment could commit over each other; take care that only one does"
        )

    def _keeps_conditions(self, key: str) -> bool:
        """Return whether creating this key, which exists, is refused by the store itself."""
        return False

    # --- beneath it ------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        if key.startswith("/") or ".." in key.split("/"):
            raise ValueError(f"{key!r} is not a key")
        return f"{self._root}/{key}" if key else self._root

    def _range(self, key: str, start: int, stop: int) -> bytes:
        data: bytes = self._fs.cat_file(self._path(key), start=start, end=stop)
        return data

    def _refuse_taken(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self.size(key)
            raise AlreadyExists(f"{self.url}/{key} exists already")

    def _accept_own(self, key: str, data: bytes) -> None:
        """After a refused creation: one's own bytes are there if only the answer was lost."""
        with suppress(FileNotFoundError):
            if self.read(key) == data:
                return
        raise AlreadyExists(f"{self.url}/{key} exists already")

    def _try(self, verb: str, key: str, do: Callable[[], T], *, may_be_missing: bool = False) -> T:
        """Call `do`, again and again while it may succeed; equal jitter between (Brooker 2015)."""
        began, tries = time.monotonic(), self._settings.retries + 1
        for number in range(tries):
            try:
                return do()
            except FileExistsError:
                raise
            except Exception as error:
                missing = isinstance(error, FileNotFoundError) and _code(error) != "NoSuchBucket"
                if missing and may_be_missing:
                    raise FileNotFoundError(f"{self.url}/{key}") from None
                is_known = isinstance(error, OSError | TimeoutError) or type(
                    error
                ).__module__.startswith(_FOREIGN)
                if not is_known:
                    raise
                if missing or not _may_succeed(error) or number + 1 == tries:
                    self._give_up(verb, key, error, number + 1, time.monotonic() - began)
                if _code(error) in _EXPIRED:
                    with self._connecting:
                        self._connect()  # the environment or a profile may have new credentials
            longest_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**number)
            time.sleep(_JITTER.uniform(longest_s / 2, longest_s))
        raise AssertionError

    def _give_up(
        self, verb: str, key: str, error: Exception, tries: int, seconds: float
    ) -> NoReturn:
        code = _code(error)
        advice = _ADVICE.get(code, "check the server and the network, then run the command again")
        often = f" ({tries} tries in {seconds:.0f} s)" if tries > 1 else ""
        what = self._without_secrets(f"{type(error).__name__}: {error}"[:500])
        where = f"{self.url}/{key}" if key else self.url
        raise StoreError(f"cannot {verb} {where}: {what}{often}; {advice}") from None

    def _without_secrets(self, text: str) -> str:
        known = {os.environ.get(name) for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")}
        known |= set(_strings(self._settings.options))
        for secret in known:
            if secret and len(secret) > 3:
                text = text.replace(secret, "***")
        return text


class S3Store(FsspecStore):
    """Keys as objects of an S3 bucket, through s3fs."""

    def _options(self) -> dict[str, Any]:
        wanted = self._settings
        client = {"region_name": wanted.region} if wanted.region else {}
        config: dict[str, Any] = {
            "connect_timeout": _CONNECT_S,
            "read_timeout": wanted.timeout_s,
            "max_pool_connections": _CONNECTIONS,
            "retries": {"total_max_attempts": 1},  # `_try` repeats, nobody beneath it
            "signature_version": "s3v4",  # also in links
        }
        if wanted.path_style:
            config["s3"] = {"addressing_style": "path"}
        return {
            "skip_instance_cache": True,
            "use_listings_cache": False,
            "endpoint_url": wanted.endpoint_url,
            "client_kwargs": client,
            "config_kwargs": config,
            **wanted.options,
        }

    def _connect(self) -> None:
        super()._connect()
        self._fs.retries = 1
        self._bucket, _, self._prefix = self._root.partition("/")
        self._direct = Direct(self._settings.timeout_s)

    def call(self, method: str, key: str = "", **arguments: Any) -> Any:
        """Send one request about a key."""
        if key:
            arguments["Key"] = self._path(key).partition("/")[2]
        return self._fs.call_s3(method, Bucket=self._bucket, **arguments)

    def open_new(self, key: str, total_bytes: int) -> NewFile:
        """Begin an upload in parts; what fits into one part is put at once."""
        self._path(key)
        self._refuse_taken(key)
        if total_bytes <= _PART_BYTES:
            return _HeldFile(self, key, total_bytes)
        return _Upload(self, key, total_bytes)

    def create(self, key: str, data: bytes) -> None:
        """Put it with `If-None-Match: *`, in one request whatever its size.

        For servers that do not know the condition, it is looked for first. Between the look and
        the creation another one may come, on such a server.
        """
        self._path(key)
        try:
            self._refuse_taken(key)
            self._try("create", key, lambda: self._create(key, data))
        except (AlreadyExists, FileExistsError):
            self._accept_own(key, data)

    def _create(self, key: str, data: bytes) -> None:
        try:
            self.call("put_object", key, Body=data, IfNoneMatch="*")
        except Exception as error:
            if _code(error) == "PreconditionFailed":
                raise FileExistsError(key) from None
            if _code(error) != "NotImplemented":
                raise
            self.call("put_object", key, Body=data)

    def _keeps_conditions(self, key: str) -> bool:
        try:
            self._try("create", key, lambda: self._create(key, b"another"))
        except FileExistsError:
            return True
        return False

    def replace(self, key: str, data: bytes) -> None:
        """Put it, whatever is there, in one request."""
        self._path(key)
        self._try("replace", key, lambda: self.call("put_object", key, Body=data))

    def size(self, key: str) -> int:
        """Ask for the object's size."""
        self._path(key)
        found = self._try("look at", key, lambda: self._head(key), may_be_missing=True)
        return int(found["ContentLength"])

    def _head(self, key: str) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = self.call("head_object", key)
        except (FileNotFoundError, PermissionError):
            self.call("list_objects_v2", Prefix=self._prefix, MaxKeys=1)  # a HEAD says not why
            raise
        return found

    def read_into(
        self, key: str, start: int, buffer: memoryview, *, is_shared: bool = False
    ) -> int:
        """Get one range, straight into `buffer` where no proxy is between."""
        view = buffer.cast("B")
        if not len(view) or not self._is_direct():
            return super().read_into(key, start, view)

        def get() -> int:
            url = self._link("get_object", key)
            wanted = {"Range": f"bytes={start}-{start + len(view) - 1}"}
            try:
                answer = self._direct.get_into(url, view, wanted)
            except RefusedError as error:
                if _code(error) in ("InvalidRange", "416"):
                    return 0
                if _code(error) == "NoSuchKey":
                    raise FileNotFoundError(key) from error
                raise
            if start and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise OSError("the server does not answer with the range that was asked for")
            return answer.nbytes

        return self._try("read", key, get, may_be_missing=True)

    def _is_direct(self) -> bool:
        """Return whether bodies may pass by the client library, whose settings are the usual."""
        changed = {"client_kwargs", "config_kwargs", "session"} & self._settings.options.keys()
        address = self._settings.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3")
        address = address or os.environ.get("AWS_ENDPOINT_URL") or "https://"
        return not changed and not has_proxy(address)

    def _link(self, method: str, key: str, **arguments: Any) -> str:
        """Return a URL that is signed for one request about a key."""
        from fsspec.asyn import sync

        name = self._path(key).partition("/")[2]

        async def sign() -> str:
            await self._fs.set_session()
            client = await self._fs.get_s3(self._bucket)
            url: str = await client.generate_presigned_url(
                method, Params={"Bucket": self._bucket, "Key": name, **arguments}
            )
            return url

        url: str = sync(self._fs.loop, sign)
        return url

    def send_part(self, key: str, number: int, upload: str, body: memoryview) -> dict[str, Any]:
        """Send one part of an upload; return what its completion says of it."""
        crc = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
        facts = {"PartNumber": number, "UploadId": upload, "ChecksumCRC32": crc}

        def send() -> str:
            if not self._is_direct():
                sent = self.call("upload_part", key, Body=bytes(body), **facts)
                return str(sent["ETag"])
            url = self._link("upload_part", key, **facts)
            answer = self._direct.put(url, body, {"x-amz-checksum-crc32": crc})
            return answer.headers.get("ETag", "")

        etag = self._try("write", key, send)
        return {"PartNumber": number, "ETag": etag, "ChecksumCRC32": crc}

    def read(self, key: str) -> bytes:
        """Get the whole object, in one request."""
        self._path(key)
        return self._try("read", key, lambda: self._get(key), may_be_missing=True)

    def _get(self, key: str, **arguments: str) -> bytes:
        from fsspec.asyn import sync

        name = self._path(key).partition("/")[2]

        async def get() -> bytes:
            answer = await self._fs._call_s3(
                "get_object", Bucket=self._bucket, Key=name, **arguments
            )
            async with answer["Body"] as body:
                data: bytes = await body.read()
            return data

        data: bytes = sync(self._fs.loop, get)
        return data

    def _range(self, key: str, start: int, stop: int) -> bytes:
        try:
            return self._get(key, Range=f"bytes={start}-{stop - 1}")
        except Exception as error:
            if _code(error) in ("InvalidRange", "416"):
                return b""
            raise

    def entries(self, folder: str) -> list[str]:
        """List one level by prefix and delimiter."""
        prefix = f"{self._path(folder)}/".partition("/")[2]
        pages = self._try("list", folder, lambda: list(self._pages(Prefix=prefix, Delimiter="/")))
        found = [item["Key"] for page in pages for item in page.get("Contents", ())]
        found += [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ())]
        return sorted(name.removeprefix(prefix) for name in found if name != prefix)

    def list(self, prefix: str, *, unfinished: bool = False) -> list[str]:
        """List by prefix; uploads in parts that were not completed are asked for apart."""
        folder = f"{self._path(prefix)}/".partition("/")[2]
        found = set(self._try("list", prefix, lambda: set(self._objects(folder))))
        if unfinished:
            found |= {key for key, _ in self._uploads(folder)}
        cut = len(self._prefix) + 1 if self._prefix else 0
        return sorted(name[cut:] for name in found)

    def _objects(self, folder: str) -> Iterator[str]:
        for page in self._pages(Prefix=folder):
            yield from (item["Key"] for item in page.get("Contents", ()))

    def _pages(self, **what: str) -> Iterator[Mapping[str, Any]]:
        more: dict[str, str] = {}
        while True:
            page = self.call("list_objects_v2", **what, **more)
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def modified_s(self, key: str) -> float:
        """Ask for the object's time of modification."""
        self._path(key)
        found = self._try("look at", key, lambda: self._head(key), may_be_missing=True)
        modified: datetime = found["LastModified"]
        return modified.timestamp()

    def _uploads(self, prefix: str) -> "_Uploads":
        found: _Uploads = []
        more: dict[str, str] = {}
        while True:
            page = self._try("list the uploads below", prefix, partial(self._page, prefix, more))
            found += [(upload["Key"], upload["UploadId"]) for upload in page.get("Uploads", ())]
            if not page.get("IsTruncated"):
                return found
            more = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    def _page(self, prefix: str, more: Mapping[str, str]) -> Mapping[str, Any]:
        try:
            page: Mapping[str, Any] = self.call("list_multipart_uploads", Prefix=prefix, **more)
        except (PermissionError, NotImplementedError):  # then they stay, and nothing else
            return {}
        return page

    def delete(self, keys: Iterable[str]) -> None:
        """Delete one after another, and what was begun of them and not completed."""
        wanted = list(keys)
        for key in wanted:
            self._path(key)
            self._try("delete", key, partial(self.call, "delete_object", key))
        if wanted:
            names = {self._path(key).partition("/")[2] for key in wanted}
            folder = os.path.commonpath(names) if len(names) > 1 else min(names)
            for name, upload in self._uploads(folder):
                if name in names:
                    self.end_upload(name.removeprefix(self._prefix).lstrip("/"), upload)

    def end_upload(self, key: str, upload: str) -> None:
        """Give up an upload, so that its parts are not kept."""
        with suppress(FileNotFoundError):
            self._try(
                "end the upload of", key,
                lambda: self.call("abort_multipart_upload", key, UploadId=upload),
                may_be_missing=True,
            )  # fmt: skip


class _HeldFile:
    """A new key that is held in memory until it is finished, and put in one piece."""

    part_bytes = _PART_BYTES

    def __init__(self, store: FsspecStore, key: str, total_bytes: int) -> None:
        self._store, self._key = store, key
        self._data = bytearray(total_bytes)

    def put(self, start: int, data: memoryview) -> None:
        self._data[start : start + len(data)] = data

    def finish(self) -> None:
        self._store.replace(self._key, bytes(self._data))

    def abort(self) -> None:
        self._data = bytearray()


class _Upload:
    """An upload in parts, several in flight; each is sent with a checksum that the server checks.

    Parts go from the caller's memory. Where a proxy is between, the client library sends them,
    which takes a copy of each.
    """

    def __init__(self, store: S3Store, key: str, total_bytes: int) -> None:
        self._store, self._key, self._total_bytes = store, key, total_bytes
        even = -(-total_bytes // _MAX_PARTS)
        self.part_bytes = -(-even // _PART_BYTES) * _PART_BYTES
        self._parts: dict[int, dict[str, Any]] = {}
        begun = store._try("write", key, self._begin)
        self._upload = begun["UploadId"]

    def _begin(self) -> Any:
        return self._store.call("create_multipart_upload", self._key, ChecksumAlgorithm="CRC32")

    def put(self, start: int, data: memoryview) -> None:
        number = start // self.part_bytes + 1
        body = data.cast("B")
        self._parts[number] = self._store.send_part(self._key, number, self._upload, body)

    def finish(self) -> None:
        parts = [self._parts[number] for number in sorted(self._parts)]
        self._store._try("write", self._key, lambda: self._complete(parts))

    def _complete(self, parts: list[dict[str, Any]]) -> None:
        try:
            self._store.call(
                "complete_multipart_upload", self._key,
                UploadId=self._upload, MultipartUpload={"Parts": parts},
            )  # fmt: skip
        except FileNotFoundError:  # of the upload: the answer to its completion was lost, perhaps
            if self._store.size(self._key) != self._total_bytes:
                raise

    def abort(self) -> None:
        with suppress(StoreError):
            self._store.end_upload(self._key, self._upload)


_JITTER = random.SystemRandom()
"""The generator of the module is the training's, and its state is in every checkpoint."""
_CREATING = threading.Lock()
"""File systems without conditional creation look first: at least not two threads at a time."""


def _code(error: BaseException | None) -> str:
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
        error = error.__cause__
    return 0


def _may_succeed(error: Exception) -> bool:
    """Return whether it may succeed later: RFC 9110's 5xx, 408, 409 and 429, and no answer."""
    code, status = _code(error), _status(error)
    if code in _EXPIRED:
        return True
    if code in ("NoCredentials", "RequestTimeTooSkewed", "NotImplemented"):
        return False
    if status:
        wrong_on_the_way = code in ("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch")
        passing = status >= 500 or status in (408, 409, 429) or code == "RequestTimeout"
        return passing or wrong_on_the_way
    return not isinstance(error, PermissionError | FileNotFoundError)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _strings(each)
