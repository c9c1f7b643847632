"""HTTP requests whose bodies go from memory, or into it, without a copy between.

HTTP/1.1: RFC 9112. Links that are signed beforehand stand for the credentials.
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
    """An answer ended before its end."""


@dataclass(frozen=True)
class Answer:
    """What a request came to."""

    headers: http.client.HTTPMessage
    nbytes: int
    """Bytes of the body that were put into memory."""


class Direct:
    """Keeps connections to one server, for requests from any thread.

    Args:
        timeout_s: a request without an answer for so long fails.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._idle: deque[tuple[str, http.client.HTTPConnection]] = deque()
        weakref.finalize(self, _close, self._idle)

    def put(self, url: str, body: memoryview, headers: Mapping[str, str]) -> Answer:
        """Send `body` as it lies in memory.

        Raises:
            RefusedError: the server answered with an error.
            OSError: there was no answer.
        """
        return self._request("PUT", url, body, headers, memoryview(bytearray()))

    def get_into(self, url: str, into: memoryview, headers: Mapping[str, str]) -> Answer:
        """Receive the answer's body, of at most the size of `into`, where it is to lie.

        Raises:
            CutShortError: the body ended before its end.
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
        place = f"{parts.scheme}://{parts.netloc}"
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        while True:
            is_used, connection = self._connection(place)
            try:
                answer = _exchange(connection, method, target, body, headers, into)
            except RefusedError:
                connection.close()  # the rest of what was sent may be on its way
                raise
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if is_used and not isinstance(error, TimeoutError | CutShortError):
                    continue  # the server had closed it in the meantime; there are fewer now
                if isinstance(error, OSError):
                    raise
                raise OSError(f"{type(error).__name__}: {error}") from None
            except BaseException:
                connection.close()
                raise
            self._idle.append((place, connection))
            return answer

    def _connection(self, place: str) -> tuple[bool, http.client.HTTPConnection]:
        """Return whether it was used before, and a connection that nobody else has."""
        while self._idle:
            try:
                known, connection = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            if known == place:
                return True, connection
            connection.close()
        scheme, _, host = place.partition("://")
        made: http.client.HTTPConnection
        if scheme == "https":
            bundle = os.environ.get("AWS_CA_BUNDLE")
            context = ssl.create_default_context(cafile=bundle)
            made = http.client.HTTPSConnection(host, timeout=_CONNECT_S, context=context)
        else:
            made = http.client.HTTPConnection(host, timeout=_CONNECT_S)
        made.connect()
        made.sock.settimeout(self._timeout_s)
        made.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return False, made


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
    except (BrokenPipeError, ConnectionResetError):  # it may have answered before it had all
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
    answer.read()  # nothing is left, and the connection is free
    return Answer(answer.headers, count)


def _receive(answer: http.client.HTTPResponse, into: memoryview) -> int:
    """Put the body where it is to lie; return its bytes, which are as many as were promised."""
    expected = answer.length  # None where it comes in chunks
    if found := re.fullmatch(r"bytes (\d+)-(\d+)/.*", answer.headers.get("Content-Range", "")):
        expected = int(found[2]) + 1 - int(found[1])
    if expected is not None and expected > len(into):
        raise CutShortError(f"{expected:,} bytes come, {len(into):,} were asked for")
    count = 0
    while count < len(into) and (received := answer.readinto(into[count:])):
        count += received
    if expected is not None and count < expected:
        raise CutShortError(f"{count:,} of {expected:,} bytes")
    return count


def _refused(answer: http.client.HTTPResponse) -> RefusedError:
    """Return the error that an S3 server describes in XML."""
    text = answer.read(100_000).decode("utf-8", "replace")
    found = dict(re.findall(r"<(Code|Message)>([^<]*)<", text))
    code = found.get("Code") or str(answer.status)
    return RefusedError(answer.status, code, found.get("Message") or answer.reason)
