"""Store in an S3 bucket, through s3fs: checksummed parts, conditional create, ranges.

Amazon S3 API: PutObject with If-None-Match, CreateMultipartUpload, UploadPart, ListObjectsV2.
"""

import base64
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

from trainer.core.threads import in_parallel
from trainer.errors import StoreError
from trainer.storage.direct import Direct, RefusedError, has_proxy
from trainer.storage.remote import CONNECTIONS, PART_BYTES, FsspecStore, error_code
from trainer.storage.store import AlreadyExists, positioned, recut

_MAX_PARTS = 10_000
_THREADS = 8
"""Parts in flight."""
_CONNECT_S = 10.0
_Uploads = list[tuple[str, str]]
"""Pairs of key in the bucket and upload id."""


class S3Store(FsspecStore):
    """Keys as objects of an S3 bucket, through s3fs."""

    def _options(self) -> dict[str, Any]:
        settings = self._settings
        client = {"region_name": settings.region} if settings.region else {}
        config: dict[str, Any] = {
            "connect_timeout": _CONNECT_S,
            "read_timeout": settings.timeout_s,
            "max_pool_connections": CONNECTIONS,
            "retries": {"total_max_attempts": 1},  # only `_try` retries
            "signature_version": "s3v4",  # also for presigned URLs
        }
        if settings.path_style:
            config["s3"] = {"addressing_style": "path"}
        return {
            "skip_instance_cache": True,
            "use_listings_cache": False,
            "endpoint_url": settings.endpoint_url,
            "client_kwargs": client,
            "config_kwargs": config,
            **settings.options,
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

    def write(self, key: str, total_bytes: int, parts: Iterable[memoryview]) -> None:
        """Send several parts of a multipart upload at a time; a small object in one request."""
        if total_bytes <= self.part_bytes:
            super().write(key, total_bytes, parts)
            return
        self._check_absent(key)
        upload = _Upload(self, key, total_bytes)
        try:
            cut = recut(parts, upload.part_bytes)
            in_parallel(upload.put, positioned(cut, total_bytes), _THREADS)
            upload.finish()
        except BaseException:
            upload.abort()
            raise

    def create(self, key: str, data: bytes) -> None:
        """Put it with `If-None-Match: *`, in one request of any size.

        The key is looked up first, for servers without conditional create. On those, another
        process may create it in between.
        """
        self._path(key)
        try:
            self._check_absent(key)
            self._try("create", key, lambda: self._create(key, data))
        except (AlreadyExists, FileExistsError):
            self._accept_own(key, data)

    def _create(self, key: str, data: bytes) -> None:
        try:
            self.call("put_object", key, Body=data, IfNoneMatch="*")
        except Exception as error:
            if error_code(error) == "PreconditionFailed":
                raise FileExistsError(key) from None
            if error_code(error) != "NotImplemented":
                raise
            self.call("put_object", key, Body=data)

    def _has_conditional_create(self, key: str) -> bool:
        try:
            self._try("create", key, lambda: self._create(key, b"another"))
        except FileExistsError:
            return True
        return False

    def replace(self, key: str, data: bytes) -> None:
        """Put it unconditionally, in one request."""
        self._path(key)
        self._try("replace", key, lambda: self.call("put_object", key, Body=data))

    def size(self, key: str) -> int:
        """Ask for the object's size."""
        self._path(key)
        head = self._try("look at", key, lambda: self._head(key), may_be_missing=True)
        return int(head["ContentLength"])

    def _head(self, key: str) -> Mapping[str, Any]:
        try:
            head: Mapping[str, Any] = self.call("head_object", key)
        except Exception as error:
            if isinstance(error, FileNotFoundError | PermissionError) or error_code(error) == "400":
                # an error of this request has a code, unlike that of a HEAD
                self.call("list_objects_v2", Prefix=self._prefix, MaxKeys=1)
            raise
        return head

    def read_into(
        self, key: str, start: int, buffer: memoryview, *, is_shared: bool = False
    ) -> int:
        """Get one range, directly into `buffer` unless a proxy is set."""
        view = buffer.cast("B")
        if not len(view) or not self._is_direct():
            return super().read_into(key, start, view)

        def get() -> int:
            url = self._link("get_object", key)
            headers = {"Range": f"bytes={start}-{start + len(view) - 1}"}
            try:
                answer = self._direct.get_into(url, view, headers)
            except RefusedError as error:
                if error_code(error) in ("InvalidRange", "416"):
                    return 0
                if error_code(error) == "NoSuchKey":
                    raise FileNotFoundError(key) from error
                raise
            if start and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise OSError("the server did not return the requested range")
            return answer.nbytes

        return self._try("read", key, get, may_be_missing=True)

    def _is_direct(self) -> bool:
        """Return whether bodies may bypass the client library: default settings and no proxy."""
        changed = {"client_kwargs", "config_kwargs", "session"} & self._settings.options.keys()
        return not changed and not has_proxy(self._settings.server or "https://")

    def _link(self, method: str, key: str, **arguments: Any) -> str:
        """Return a presigned URL for one request about a key."""
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
        """Send one part of an upload; return its entry in the completion request."""
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
        """Get the object in one request."""
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
            if error_code(error) in ("InvalidRange", "416"):
                return b""
            raise

    def entries(self, folder: str) -> list[str]:
        """List one level by prefix and delimiter."""
        prefix = f"{self._path(folder)}/".partition("/")[2]
        pages = self._try("list", folder, lambda: list(self._pages(Prefix=prefix, Delimiter="/")))
        names = [item["Key"] for page in pages for item in page.get("Contents", ())]
        names += [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ())]
        return sorted(name.removeprefix(prefix) for name in names if name != prefix)

    def list(self, prefix: str, *, unfinished: bool = False) -> list[str]:
        """List by prefix; incomplete multipart uploads need a separate request."""
        folder = f"{self._path(prefix)}/".partition("/")[2]
        names = set(self._try("list", prefix, lambda: set(self._objects(folder))))
        if unfinished:
            names |= {key for key, _ in self._uploads(folder)}
        cut = len(self._prefix) + 1 if self._prefix else 0
        return sorted(name[cut:] for name in names)

    def _objects(self, folder: str) -> Iterator[str]:
        for page in self._pages(Prefix=folder):
            yield from (item["Key"] for item in page.get("Contents", ()))

    def _pages(self, **arguments: str) -> Iterator[Mapping[str, Any]]:
        more: dict[str, str] = {}
        while True:
            page = self.call("list_objects_v2", **arguments, **more)
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def modified_s(self, key: str) -> float:
        """Ask for the object's time of modification."""
        self._path(key)
        head = self._try("look at", key, lambda: self._head(key), may_be_missing=True)
        modified: datetime = head["LastModified"]
        return modified.timestamp()

    def _uploads(self, prefix: str) -> _Uploads:
        uploads: _Uploads = []
        more: dict[str, str] = {}
        while True:
            page = self._try("list the uploads below", prefix, partial(self._page, prefix, more))
            uploads += [(upload["Key"], upload["UploadId"]) for upload in page.get("Uploads", ())]
            if not page.get("IsTruncated"):
                return uploads
            more = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    def _page(self, prefix: str, more: Mapping[str, str]) -> Mapping[str, Any]:
        try:
            page: Mapping[str, Any] = self.call("list_multipart_uploads", Prefix=prefix, **more)
        except (PermissionError, NotImplementedError):  # then incomplete uploads remain
            return {}
        return page

    def delete(self, keys: Iterable[str]) -> None:
        """Delete one after another, with their incomplete uploads."""
        deleted = list(keys)
        for key in deleted:
            self._path(key)
            self._try("delete", key, partial(self.call, "delete_object", key))
        if deleted:
            names = {self._path(key).partition("/")[2] for key in deleted}
            folder = os.path.commonpath(names) if len(names) > 1 else min(names)
            for name, upload in self._uploads(folder):
                if name in names:
                    self.end_upload(name.removeprefix(self._prefix).lstrip("/"), upload)

    def end_upload(self, key: str, upload: str) -> None:
        """Abort an upload, so that its parts are deleted."""
        with suppress(FileNotFoundError):
            self._try(
                "end the upload of", key,
                lambda: self.call("abort_multipart_upload", key, UploadId=upload),
                may_be_missing=True,
            )  # fmt: skip


class _Upload:
    """Multipart upload with several parts in flight, each with a checksum for the server.

    Parts are sent from the caller's memory. With a proxy, the client library sends a copy.
    """

    def __init__(self, store: S3Store, key: str, total_bytes: int) -> None:
        self._store, self._key, self._total_bytes = store, key, total_bytes
        even = -(-total_bytes // _MAX_PARTS)
        self.part_bytes = -(-even // PART_BYTES) * PART_BYTES
        self._parts: dict[int, dict[str, Any]] = {}
        response = store._try("write", key, self._start)
        self._upload = response["UploadId"]

    def _start(self) -> Any:
        return self._store.call("create_multipart_upload", self._key, ChecksumAlgorithm="CRC32")

    def put(self, part: tuple[int, memoryview]) -> None:
        start, body = part
        number = start // self.part_bytes + 1
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
        except FileNotFoundError:
            # No such upload: the response to its completion may have been lost.
            if self._store.size(self._key) != self._total_bytes:
                raise

    def abort(self) -> None:
        with suppress(StoreError):
            self._store.end_upload(self._key, self._upload)
