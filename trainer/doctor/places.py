"""Permissions, conditional create, free space and speed of a run's stores."""

import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.memory import HostBuffer
from trainer.core.formatting import size
from trainer.doctor.finding import Finding
from trainer.errors import PerdureError, StoreError
from trainer.storage import AlreadyExists, Store, local_path
from trainer.storage.store import in_pieces

_SPEED_BYTES = 256 << 20
_REMOTE_SPEED_BYTES = 64 << 20
_CLOCK_S = 60.0
"""Maximum clock difference; S3 rejects requests at 15 minutes (RequestTimeTooSkewed)."""


@dataclass(frozen=True)
class Speed:
    """Measured speed of a store."""

    write_bytes_per_s: float
    read_bytes_per_s: float


def remove_empty(store: Store) -> None:
    """Remove the directory of a local store that the checks created and that is empty."""
    if (path := local_path(store.url)) is not None:
        with suppress(OSError):  # not empty
            path.rmdir()


def check_permissions(topic: str, store: Store) -> list[Finding]:
    """Create, create again, read, replace, list and delete a small key, as a run does."""
    folder = f".tmp-doctor-{secrets.token_hex(4)}"
    key = f"{folder}/key"
    try:
        start_s = time.monotonic()
        store.create(key, b"first")
        create_s = time.monotonic() - start_s
        findings = [_condition(topic, store, key)]
        store.replace(key, b"second")
        if store.read(key) != b"second" or key not in store.list(folder):
            advice = "reads are not consistent with writes; use another store"
            findings.append(Finding(topic, "red", f"{store.url}: stale reads", advice))
        findings += _clock(topic, store, key)
        store.delete([key])
        if store.list(folder):
            advice = "old checkpoints cannot be deleted: grant this user permission to delete"
            findings.append(
                Finding(
                    topic, "red", f"{store.url}: {key} still exists after it was deleted", advice
                )
            )
        text = f"{store.url}: write, read, list, delete; {create_s * 1e3:.1f} ms to create a key"
        return [Finding(topic, "green", text), *findings]
    except (StoreError, FileNotFoundError) as error:
        with suppress(PerdureError):
            store.delete([key])
        advice = "grant this user put, get, list and delete there, or use another store"
        return [Finding(topic, "red", str(error), advice)]


def _condition(topic: str, store: Store, key: str) -> Finding:
    try:
        store.create(key, b"other")
    except AlreadyExists:
        return Finding(topic, "green", "conditional create works")
    text = f"{store.url} lets a second writer create an existing key"
    advice = "two jobs on one run could overwrite each other; start one at a time, or use " \
             "a store that honours If-None-Match"  # fmt: skip
    return Finding(topic, "yellow" if local_path(store.url) is None else "red", text, advice)


def _clock(topic: str, store: Store, key: str) -> list[Finding]:
    off_s = store.modified_s(key) - time.time()
    if abs(off_s) < _CLOCK_S:
        return []
    text = f"the clock of {store.url} is {off_s:+.0f} s from this machine's"
    return [
        Finding(
            topic, "yellow", text, "set this machine's clock; S3 rejects a difference of 15 minutes"
        )
    ]


def check_space(
    topic: str, store: Store, checkpoint_bytes: int | None, count: int
) -> list[Finding]:
    """Compare the free space of a local store with the size of the run's checkpoints.

    Args:
        topic: topic of the finding, such as `run_dir`.
        store: the store; object stores have no limit.
        checkpoint_bytes: bytes of one checkpoint, if known.
        count: maximum number of checkpoints stored at once, including the one in progress.
    """
    if local_path(store.url) is None:
        return []
    free = _free_bytes(store)
    if checkpoint_bytes is None:
        return [Finding(topic, "green", f"{size(free)} free; checkpoint size unknown")]
    needed = checkpoint_bytes * count
    text = f"{size(free)} free, {count} checkpoints of {size(checkpoint_bytes)} need {size(needed)}"
    if free < needed:
        advice = "free space, use another disk, or set checkpoint.keep_last=1 and keep_best=0"
        return [Finding(topic, "red", text, advice)]
    if free < 2 * needed:
        return [Finding(topic, "yellow", text, "other jobs may fill the disk; free more space")]
    return [Finding(topic, "green", text)]


def _free_bytes(store: Store) -> int:
    folder = Path(store.url).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def measure_speed(topic: str, store: Store) -> tuple[list[Finding], Speed | None]:
    """Measure one durable write and one read, bypassing the page cache if possible."""
    local = local_path(store.url) is not None
    total = min(_SPEED_BYTES, _free_bytes(store) // 4) if local else _REMOTE_SPEED_BYTES
    total -= total % (4 << 20)
    if not total:
        return [Finding(topic, "yellow", "too little free space to measure the speed")], None
    buffer = HostBuffer(total, pinned=False)
    buffer.array[:] = secrets.token_bytes(1)[0]
    key = f".tmp-doctor-{secrets.token_hex(4)}/speed"
    try:
        write_s = _timed(lambda: store.write(key, total, in_pieces(buffer.view, store.part_bytes)))
        read_s = _timed(lambda: _read(store, key, buffer.view))
    except (StoreError, FileNotFoundError) as error:
        return [Finding(topic, "red", str(error), "speed not measured; check the store")], None
    finally:
        with suppress(PerdureError):
            store.delete([key])
    measured = Speed(total / write_s, total / read_s)
    text = f"writes {size(measured.write_bytes_per_s)}/s, reads {size(measured.read_bytes_per_s)}/s"
    if local:
        text += f"; through the page cache, with fsync, {size(_buffered(store, buffer.view))}/s"
    return [Finding(topic, "green", text)], measured


def _timed(do: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    do()
    return time.perf_counter() - start_s


def _read(store: Store, key: str, data: memoryview) -> None:
    for start in range(0, len(data), store.read_bytes):
        store.read_into(key, start, data[start : start + store.read_bytes])


def _buffered(store: Store, data: memoryview) -> float:
    """Return bytes per second of a buffered write with fsync."""
    path = Path(store.url, f".tmp-doctor-{secrets.token_hex(4)}")
    start_s = time.perf_counter()
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return len(data) / (time.perf_counter() - start_s)
    finally:
        path.unlink(missing_ok=True)
