"""An HTTP proxy before a real S3 server that makes chosen requests fail, each in its own way."""

import http.client
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_ERROR = (
    "<?xml version='1.0'?><Error><Code>{code}</Code><Message>made to fail</Message>"
    "<RequestId>1</RequestId></Error>"
)


@dataclass
class Fault:
    """Fault applied to the next matching requests.

    Args:
        how: `answer` with an error; `reset` or `delay` before the answer; `cut` or `alter` the
            answer's body; `spoil` the request's body.
        times: to how many requests; -1: all.
        method: of HTTP, or any.
        path: a part of the path and query, or any.
        header: one that the request has, or any.
    """

    how: str
    times: int = 1
    method: str = ""
    path: str = ""
    header: str = ""
    status: int = 503
    code: str = "SlowDown"
    delay_s: float = 3.0
    met: int = field(default=0, init=False)


class Proxy:
    """Listen on a free port."""

    def __init__(self, endpoint: str) -> None:
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, urlsplit(endpoint)))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault_of(self, method: str, path: str, headers: Mapping[str, str]) -> Fault | None:
        with self._lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                meant = fault.method in ("", method) and fault.path in path
                if fault.times and meant and (not fault.header or fault.header in headers):
                    fault.times -= 1
                    fault.met += 1
                    return fault
        return None


def _handler(proxy: Proxy, to) -> type[BaseHTTPRequestHandler]:  # noqa: C901 (a class)
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = bytearray(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            fault = proxy.fault_of(self.command, self.path, self.headers) or Fault("")
            if fault.how == "answer":
                self._send(fault.status, {}, _ERROR.format(code=fault.code).encode())
                return
            if fault.how == "delay":
                time.sleep(fault.delay_s)
            if fault.how == "spoil" and body:
                body[len(body) // 2] ^= 1
            status, headers, data = self._ask(bytes(body))
            if fault.how == "reset":
                self.close_connection = True
                self.connection.close()
                return
            if fault.how == "alter" and data:
                data[len(data) // 2] ^= 1
            self._send(status, headers, bytes(data), cut=fault.how == "cut")

        def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytearray]:
            server = http.client.HTTPConnection(to.hostname, to.port, timeout=60)
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # Host among them: it is signed
                server.putheader(name, value)
            server.endheaders(body or None)
            answer = server.getresponse()
            data = bytearray(answer.read())
            server.close()
            return answer.status, dict(answer.getheaders()), data

        def _send(
            self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False
        ) -> None:
            self.send_response_only(status)
            dropped = ("content-length", "transfer-encoding", "connection")
            for name, value in headers.items():
                if name.lower() not in dropped:
                    self.send_header(name, value)
            length = next((v for n, v in headers.items() if n.lower() == "content-length"), None)
            is_head = self.command == "HEAD"
            self.send_header("Content-Length", length if is_head and length else str(len(data)))
            self.end_headers()
            if not is_head:
                self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        def log_message(self, *_: object) -> None:
            pass

    return Handler
