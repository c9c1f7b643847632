"""Requests to an object store: retries of those that may succeed later, errors with advice."""

import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from trainer.config.schema import ObjectStore
from trainer.errors import StoreError, StoreRefusedError
from trainer.storage.store import AlreadyExists, positioned

T = TypeVar("T")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 20.0
_FOREIGN = (
    "obstore", "botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs", "gcsfs", "adlfs",
    "azure", "google",
)  # fmt: skip
"""Libraries whose exceptions are caused by the server or the network, not by bugs."""
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_HEAD_REJECTED = "400"
"""The only code in the response to a HEAD, also if the token has expired."""
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
_KEYS = "check the credentials in the environment or the profile"
_ADVICE = {
    "AccessDenied": "check the permissions of these credentials on the bucket",
    "403": "check the credentials and their permissions on the bucket",
    "InvalidAccessKeyId": _KEYS,
    "SignatureDoesNotMatch": _KEYS,
    "AuthenticationFailed": _KEYS,
    "AuthorizationFailure": _KEYS,
    "NoCredentials": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "RequestTimeTooSkewed": "set the clock of this machine, it is minutes off",
    "PermanentRedirect": "set store.region to the bucket's own",
    "InvalidCertificate": "set AWS_CA_BUNDLE to a file with the certificate of its authority",
    **dict.fromkeys(NO_BUCKET, "create the bucket, or correct its name"),
    **dict.fromkeys(_EXPIRED, "get new credentials, then run the same command again"),
}
_EXPIRED |= {_HEAD_REJECTED}
_PERMANENT = {"NoCredentials", "RequestTimeTooSkewed", "NotImplemented", "InvalidCertificate"}
_JITTER = random.SystemRandom()
"""Own generator: the global one belongs to the training, and is in every checkpoint."""


class CutShortError(OSError):
    """A response ended before its announced length."""


class RemoteStore:
    """Common part of the stores of objects below a URL; subclasses send the requests.

    Args:
        url: protocol, bucket and prefix.
        settings: timeouts, retries and further options.
    """

    read_bytes = 16 << 20
    part_bytes = 8 << 20
    _root = ""
    """Common start of all paths, without a slash at the end."""
    _advice_on_writes = ""
    """Further advice where a write was rejected."""

    def __init__(self, url: str, settings: ObjectStore) -> None:
        self.url = url.rstrip("/")
        self._settings = settings
        self._connecting = threading.Lock()
        self._connect()

    def _connect(self) -> None:
        """Make clients with the credentials of now."""
        raise NotImplementedError

    def size(self, key: str) -> int:
        """Ask for the object's size."""
        raise NotImplementedError

    def read(self, key: str) -> bytes:
        """Get the object."""
        raise NotImplementedError

    def _path(self, key: str) -> str:
        if key.startswith("/") or ".." in key.split("/"):
            raise ValueError(f"{key!r} is not a key")
        return "/".join(part for part in (self._root, key) if part)

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

    def _try(
        self,
        verb: str,
        key: str,
        do: Callable[[], T],
        *,
        may_be_missing: bool = False,
        may_repeat: Callable[[], bool] = lambda: True,
    ) -> T:
        """Call `do` with retries and equal jitter (Brooker 2015), while it may be repeated."""
        began, tries = time.monotonic(), self._settings.retries + 1
        for number in range(tries):
            try:
                return do()
            except FileExistsError:
                raise
            except Exception as error:
                fault = fault_of(error)
                missing = isinstance(error, FileNotFoundError) and fault.code not in NO_BUCKET
                if missing and may_be_missing:
                    raise FileNotFoundError(f"{self.url}/{key}") from None
                is_external = isinstance(error, OSError | TimeoutError) or type(
                    error
                ).__module__.startswith(_FOREIGN)
                if not is_external:
                    raise
                is_last = missing or number + 1 == tries or not may_repeat()
                if is_last or not _may_succeed(error, fault):
                    self._raise(verb, key, error, number + 1, time.monotonic() - began)
                if fault.code in _EXPIRED:
                    with self._connecting:
                        self._connect()  # the environment or profile may have new credentials
            longest_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**number)
            time.sleep(_JITTER.uniform(longest_s / 2, longest_s))
        raise AssertionError

    def _raise(self, verb: str, key: str, error: Exception, tries: int, seconds: float) -> NoReturn:
        fault = fault_of(error)
        tries += fault.retries
        is_refused = (
            isinstance(error, FileNotFoundError)
            or not _may_succeed(error, fault)
            or fault.code == _HEAD_REJECTED
        )
        default = (
            "the server would reject it again: check the bucket's policy and the store.* settings"
            if is_refused
            else "check the server and the network, then run the command again"
        )
        if is_refused and verb in ("write", "create", "replace") and fault.status in (400, 501):
            default += self._advice_on_writes
        advice = _ADVICE.get(fault.code, default)
        often = f" ({tries} tries in {seconds:.0f} s)" if tries > 1 else ""
        message = self._without_secrets(fault.text[:500])
        location = f"{self.url}/{key}" if key else self.url
        kind = StoreRefusedError if is_refused else StoreError
        raise kind(f"cannot {verb} {location}: {message}{often}; {advice}") from None

    def _without_secrets(self, text: str) -> str:
        names = (
            "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY",
            "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_KEY", "AZURE_CLIENT_SECRET",
            "GOOGLE_SERVICE_ACCOUNT_KEY",
        )  # fmt: skip
        hidden = {os.environ.get(name) for name in names} | set(_strings(self._settings.options))
        for secret in hidden:
            if secret and len(secret) > 3:
                text = text.replace(secret, "***")
        return re.sub(r"\b(sig|Signature|X-Amz-Signature)=[^&\s]+", r"\1=***", text)

    def _collected(self, parts: Iterable[memoryview], total_bytes: int) -> bytearray:
        """Return the bytes of all parts; each one is released before the next is taken."""
        data = bytearray(total_bytes)
        for start, part in positioned(parts, total_bytes):
            data[start : start + len(part)] = part
            del part
        return data

    def _probe_key(self) -> str:
        return f".tmp-probe-{secrets.token_hex(4)}"

    def _unsafe(self) -> str:
        """Return the warning about a server without conditional create."""
        return (
            f"{self.url} does not support conditional create: two jobs started on the same run at "
            "once could overwrite each other's commits; start only one"
        )


@dataclass(frozen=True)
class Fault:
    """Details of a failed request, from a library's exception."""

    text: str
    code: str = ""
    """The server's code, as `NoSuchKey` or `503`."""
    status: int = 0
    """Status code of HTTP; 0: no response."""
    retries: int = 0
    """Retries by the library itself."""


def fault_of(error: BaseException) -> Fault:
    """Return the details in an exception of a storage library."""
    text = str(error)
    if type(error).__module__.startswith("obstore") or "\n\nDebug source:\n" in text:
        return _obstore_fault(text)
    code, status = _response_code(error), _status(error)
    return Fault(f"{type(error).__name__}: {text}", code, status)


def _obstore_fault(text: str) -> Fault:
    """Parse the text of obstore's exceptions, the only place where they have code and status."""
    text, _, debug = text.partition("\n\nDebug source:\n")
    text = text.strip()
    repeated = re.search(r" after (\d+) retries", text)
    retries = int(repeated[1]) if repeated else 0
    if answer := re.search(r"status code: (\d{3}) ?([^:]*): ?", text):
        fields = dict(re.findall(r"<(Code|Message)>([^<]*)<", text))
        body = text[answer.end() :]
        code = fields.get("Code") or (answer[2] if body else answer[1])
        message = fields.get("Message") or body or answer[2]
        return Fault(f"{code}: {' '.join(message.split())}", code, int(answer[1]), retries)
    if "Wanted range starting at" in text:
        return Fault(text, "InvalidRange", 416, retries)
    if "Received redirect without LOCATION" in text:
        return Fault(f"PermanentRedirect: {text}", "PermanentRedirect", 301, retries)
    for name in ("NoCredentialsError", "PartialCredentialsError"):
        if name in text:
            return Fault(text.partition("provider: ")[2] or text, "NoCredentials", 0, retries)
    causes = re.findall(r'(?:message|error): "([^"]+)"|(InvalidCertificate\(\s*\w+)', debug)
    cause = "; ".join(re.sub(r"\(\s*", " ", a or b) for a, b in causes)
    if not cause and "TimedOut" in debug:
        cause = "no response in time"
    short = text.rpartition(" - ")[2]
    code = "InvalidCertificate" if cause.startswith("InvalidCertificate") else ""
    return Fault(f"{short} ({cause})" if cause else short, code, 0, retries)


def _response_code(error: BaseException | None) -> str:
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


def _may_succeed(error: Exception, fault: Fault) -> bool:
    """Return whether a retry may succeed: RFC 9110's 5xx, 408, 409, 429, or no response."""
    if fault.code in _EXPIRED:
        return True
    if fault.code in _PERMANENT:
        return False
    if fault.status:
        is_corrupted = fault.code in ("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch")
        is_temporary = fault.status >= 500 or fault.status in (408, 409, 429)
        return is_temporary or is_corrupted or fault.code == "RequestTimeout"
    return not isinstance(error, PermissionError | FileNotFoundError)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
