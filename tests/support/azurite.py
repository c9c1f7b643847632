"""A real Azure Blob server (Azurite, of npm) on this machine."""

import base64
import hashlib
import hmac
import http.client
import os
import shutil
import socket
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

from scripts.s3_server import _free_ports
from trainer.core.threads import die_with_parent

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The published account of every Azurite."""
CONTAINER = "perdure"
_READY_S = 60.0


def program() -> str | None:
    """Return the path of Azurite, or None if it is not installed."""
    return os.environ.get("AZURITE") or shutil.which("azurite-blob")


class AzureServer:
    """A server with one container.

    Args:
        folder: for its data.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, (self._port,) = folder, _free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{self._port}/{ACCOUNT}"
        self.environment = {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": self.endpoint,
        }

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                program(), "--silent", "--skipApiVersionCheck", f"--location={self._folder}",
                f"--blobPort={self._port}",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent,
        )  # fmt: skip
        until = time.monotonic() + _READY_S
        while not self._is_listening():
            assert self._process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        assert self._create_container() in (201, 409)

    def _is_listening(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def _create_container(self) -> int:
        """Send Create Container with a Shared Key signature; return the status."""
        date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        headers = {"x-ms-date": date, "x-ms-version": "2021-08-06", "Content-Length": "0"}
        signed = (
            "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:2021-08-06\n"
            f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
        )
        digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        client = http.client.HTTPConnection("127.0.0.1", self._port)
        client.request("PUT", f"/{ACCOUNT}/{CONTAINER}?restype=container", headers=headers)
        try:
            return client.getresponse().status
        finally:
            client.close()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
