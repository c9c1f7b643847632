"""Checkpoints in a bucket against what moves the same bytes: in turn, medians of ratios.

python scripts/bench_s3.py [--rounds 5] [--megabytes 300]

The server is SeaweedFS on this machine, started for the run. The floor is obstore (Rust), with
parts of 8 MiB and ranges of 16 MiB, eight at a time; the rival torch's own FsspecWriter and
FsspecReader over s3fs. CPU seconds are this process's, so the server's are not in them.
"""

import argparse
import gc
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from s3_server import BUCKET, KEY, SECRET, S3Server
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from trainer import checkpoint
from trainer.checkpoint import Content, lineage
from trainer.cluster.world import World
from trainer.storage import open_store

_PART_BYTES, _RANGE_BYTES = 8 << 20, 16 << 20
_MANY = 8


def timed(do: Callable[[], object]) -> tuple[float, float]:
    """Return seconds, and CPU seconds of this process."""
    gc.collect()
    used = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    do()
    seconds = time.perf_counter() - began
    now = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return seconds, cpu_s


class Floor:
    """obstore, with nothing but the bytes."""

    def __init__(self, endpoint: str, nbytes: int) -> None:
        from obstore.store import S3Store

        self._store = S3Store(
            BUCKET, endpoint=endpoint, access_key_id=KEY, secret_access_key=SECRET,
            region="us-east-1", client_options={"allow_http": True},
            virtual_hosted_style_request=False,
        )  # fmt: skip
        self._data = memoryview(os.urandom(nbytes))
        self._into = bytearray(os.urandom(nbytes))  # its pages exist

    def save(self) -> None:
        """Put them in parts, without a copy."""
        import obstore

        starts = range(0, len(self._data), _PART_BYTES)
        parts = (self._data[start : start + _PART_BYTES] for start in starts)
        obstore.put(
            self._store, "floor", parts,
            use_multipart=True, chunk_size=_PART_BYTES, max_concurrency=_MANY,
        )  # fmt: skip

    def load(self) -> None:
        """Get them in ranges."""
        import obstore

        into = memoryview(self._into)

        def get(start: int) -> None:
            stop = min(start + _RANGE_BYTES, len(into))
            into[start:stop] = obstore.get_range(self._store, "floor", start=start, end=stop)

        with ThreadPoolExecutor(_MANY) as pool:
            list(pool.map(get, range(0, len(into), _RANGE_BYTES)))


class Perdure:
    """A committed checkpoint, written anew each round; read back verified."""

    def __init__(self, url: str, state: dict[str, Tensor]) -> None:
        self._store, self._state = open_store(url), state
        self._writer = checkpoint.Writer(self._store, World(), lineage.begin(self._store, {}))
        self._targets = {name: torch.empty_like(tensor) for name, tensor in state.items()}
        self._step = 0

    def save(self) -> None:
        """Save and commit."""
        self._step += 1
        content = Content(tensors=self._state)
        self._manifest = checkpoint.save(self._writer, content, step=self._step)

    def load(self) -> None:
        """Load and verify."""
        checkpoint.load(self._store, self._manifest, self._targets)

    def clear(self) -> None:
        """Delete all but the newest."""
        for commit in lineage.commits(self._store)[:-1]:
            checkpoint.delete(self._store, commit)


class Blocking:
    """Time a save blocks the training thread: its start, and the wait before the update."""

    def __init__(self, folder: str, state: dict[str, Tensor]) -> None:
        self._state = state
        small = torch.zeros(1, requires_grad=True)
        small.grad = torch.zeros(1)
        self._optimizer = torch.optim.SGD([small], lr=0.0)
        self._work = torch.randn(700, 700)
        self._marks: dict[str, float] = {}
        self._step = 0
        register_optimizer_step_pre_hook(lambda *_: self._mark("before"))
        self._writers = {}
        for name, url in {"disk": folder, "S3": f"s3://{BUCKET}/blocking"}.items():
            store = open_store(url)
            writer = checkpoint.Writer(store, World(), lineage.begin(store, {}))
            checkpoint.save(writer, Content(tensors=state), step=1)  # its hook comes between
            self._writers[name] = writer
        register_optimizer_step_pre_hook(lambda *_: self._mark("after"))

    def _mark(self, name: str) -> None:
        self._marks[name] = time.perf_counter()

    def measure(self, url: str) -> float:
        """Return the seconds that a save blocked."""
        self._step += 1
        began = time.perf_counter()
        save = self._writers[url].start_save(Content(tensors=self._state), step=1 + self._step)
        begun_s = time.perf_counter() - began
        while time.perf_counter() < began + 0.5:  # forward and backward of the next step
            self._work @ self._work
        self._optimizer.step()
        save.result()
        return begun_s + self._marks["after"] - self._marks["before"]


class Dcp:
    """torch.distributed.checkpoint over s3fs."""

    def __init__(self, url: str, state: dict[str, Tensor], endpoint: str) -> None:
        self._url, self._state = url, state
        self._more = {"key": KEY, "secret": SECRET, "endpoint_url": endpoint}
        self._targets = {name: torch.empty_like(tensor) for name, tensor in state.items()}

    def save(self) -> None:
        """Save."""
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        writer = FsspecWriter(self._url, **self._more)
        dcp.save(self._state, storage_writer=writer, no_dist=True)

    def load(self) -> None:
        """Load."""
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        reader = FsspecReader(self._url, **self._more)
        dcp.load(self._targets, storage_reader=reader, no_dist=True)


def main() -> int:
    """Run all rounds; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=300)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    count = 30
    size = arguments.megabytes * 1_000_000 // count // 4
    state = {f"model.{i}": torch.randn(size) for i in range(count)}
    nbytes = 4 * size * count
    with tempfile.TemporaryDirectory(prefix="perdure-s3-") as folder:
        server = S3Server(Path(folder))
        server.start()
        os.environ |= server.environment
        floor = Floor(server.endpoint, nbytes)
        perdure = Perdure(f"s3://{BUCKET}/perdure", state)
        rival = Dcp(f"s3://{BUCKET}/dcp", state, server.endpoint)
        times: dict[str, list[tuple[float, float]]] = {}
        for _ in range(arguments.rounds):
            for verb in ("save", "load"):
                for name, one in {"floor": floor, "perdure": perdure, "dcp": rival}.items():
                    times.setdefault(f"{name} {verb}", []).append(timed(getattr(one, verb)))
            perdure.clear()
        blocking = Blocking(f"{folder}/disk", state)
        blocked: dict[str, list[float]] = {"disk": [], "S3": []}
        for _ in range(arguments.rounds):
            for url, seconds in blocked.items():
                seconds.append(blocking.measure(url))
        server.kill()
    print(f"{nbytes / 1e9:.2f} GB, {arguments.rounds} rounds, medians (range)")
    for verb in ("save", "load"):
        for name in ("floor", "perdure", "dcp"):
            rounds = times[f"{name} {verb}"]
            rate = statistics.median(nbytes / 1e9 / seconds for seconds, _ in rounds)
            cpu = statistics.median(cpu_s / (nbytes / 1e9) for _, cpu_s in rounds)
            ratios = [
                a / b for (a, _), (b, _) in zip(rounds, times[f"perdure {verb}"], strict=True)
            ]
            against = "" if name == "perdure" else (
                f"   Perdure is {statistics.median(ratios):.2f} times as fast "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )  # fmt: skip
            print(f"{verb}  {name:<6} {rate:6.3f} GB/s  {cpu:5.2f} CPU s/GB{against}")
    for url, seconds in blocked.items():
        print(f"blocked per save, to {url:<4} {1e3 * statistics.median(seconds):6.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
