"""HTTP/1.1 requests (RFC 9112) that send and receive bodies without a copy.

Presigned URLs carry the credentials.
"""

import http.client
import os
import re
import socket
import ssl
import urllib.request
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

_CONNECT_S = 10.0


class RefusedError(OSError):
    """The server answered with an error."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.response = {
            "Error": {"Code": code, "Message": message},
            "ResponseMetadata": {"HTTPStatusCode": status},
        }


class CutShortError(OSError):
    """A response ended before its announced length."""


@dataclass(frozen=True)
class Answer:
    """Response to a request."""

    headers: http.client.HTTPMessage
    nbytes: int
    """Bytes of the body that were received."""


class Direct:
    """Connections to one server, for requests from any thread.

    Args:
        timeout_s: seconds without a response until a request fails.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._idle: deque[tuple[str, http.client.HTTPConnection]] = deque()
        weakref.finalize(self, _close, self._idle)

    def put(self, url: str, body: memoryview, headers: Mapping[str, str]) -> Answer:
        """Send `body` from memory.

        Raises:
            RefusedError: the server answered with an error.
            OSError: no response.
        """
        return self._request("PUT", url, body, headers, memoryview(bytearray()))

    def get_into(self, url: str, into: memoryview, headers: Mapping[str, str]) -> Answer:
        """Receive the response's body, of at most the size of `into`, into that buffer.

        Raises:
            CutShortError: the body is shorter than announced.
            RefusedError, OSError: as above.
        """
        return self._request("GET", url, None, headers, into)

    def _request(
        self,
        method: str,
        url: str,
        body: memoryview | None,
        headers: Mapping[str, str],
        into: memoryview,
    ) -> Answer:
        parts = urlsplit(url)
        server = f"{parts.scheme}://{parts.netloc}"
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        while True:
            is_used, connection = self._connection(server)
            try:
                answer = _exchange(connection, method, target, body, headers, into)
            except RefusedError:
                connection.close()  # the rest of the body may still be in flight
                raise
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if is_used and not isinstance(error, TimeoutError | CutShortError):
                    continue  # a reused connection that the server has closed: try the next
                if isinstance(error, OSError):
                    raise
                raise OSError(f"{type(error).__name__}: {error}") from None
            except BaseException:
                connection.close()
                raise
            self._idle.append((server, connection))
            return answer

    def _connection(self, server: str) -> tuple[bool, http.client.HTTPConnection]:
        """Return whether the connection is reused, and a connection no other thread uses."""
        while self._idle:
            try:
                address, idle = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            if address == server:
                return True, idle
            idle.close()
        scheme, _, host = server.partition("://")
        connection: http.client.HTTPConnection
        if scheme == "https":
            bundle = os.environ.get("AWS_CA_BUNDLE")
            context = ssl.create_default_context(cafile=bundle)
            connection = http.client.HTTPSConnection(host, timeout=_CONNECT_S, context=context)
        else:
            connection = http.client.HTTPConnection(host, timeout=_CONNECT_S)
        connection.connect()
        connection.sock.settimeout(self._timeout_s)
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return False, connection


def _close(idle: deque[tuple[str, http.client.HTTPConnection]]) -> None:
    for _, connection in idle:
        connection.close()


def has_proxy(url: str) -> bool:
    """Return whether the environment names a proxy for this server."""
    parts = urlsplit(url)
    return parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(
        parts.netloc
    )


def _exchange(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    body: memoryview | None,
    headers: Mapping[str, str],
    into: memoryview,
) -> Answer:
    try:
        connection.request(method, target, body=body, headers=dict(headers))
    except (BrokenPipeError, ConnectionResetError):
        # The server may have rejected the request early.
        try:
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException):
            answer = None
        if answer is None or answer.status < 300:
            raise
    else:
        answer = connection.getresponse()
    if answer.status >= 300:
        raise _refused(answer)
    count = 0
    if body is None:
        count = _receive(answer, into)
    answer.read()  # empty, so that the connection can be reused
    return Answer(answer.headers, count)


def _receive(answer: http.client.HTTPResponse, into: memoryview) -> int:
    """Receive the body into `into`; return its length, which matches the announced one."""
    expected = answer.length  # None for a chunked body
    if content_range := re.fullmatch(
        r"bytes (\d+)-(\d+)/.*", answer.headers.get("Content-Range", "")
    ):
        expected = int(content_range[2]) + 1 - int(content_range[1])
    if expected is not None and expected > len(into):
        raise CutShortError(f"the server sends {expected:,} bytes, {len(into):,} were requested")
    count = 0
    while count < len(into) and (received := answer.readinto(into[count:])):
        count += received
    if expected is not None and count < expected:
        raise CutShortError(f"{count:,} of {expected:,} bytes")
    return count


def _refused(answer: http.client.HTTPResponse) -> RefusedError:
    """Return the error in an S3 server's XML response."""
    text = answer.read(100_000).decode("utf-8", "replace")
    fields = dict(re.findall(r"<(Code|Message)>([^<]*)<", text))
    code = fields.get("Code") or str(answer.status)
    return RefusedError(answer.status, code, fields.get("Message") or answer.reason)
