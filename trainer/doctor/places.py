"""The places of a run: rights, conditions, space and speed, on disks and object stores."""

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

_SPEED_BYTES = 256 << 20
_REMOTE_SPEED_BYTES = 64 << 20
_CLOCK_S = 60.0
"""S3 refuses requests that are 15 minutes off (RequestTimeTooSkewed)."""


@dataclass(frozen=True)
class Speed:
    """What a place was measured to take and give."""

    write_bytes_per_s: float
    read_bytes_per_s: float


def leave(store: Store) -> None:
    """Remove what an examination has created of a place that was not there before."""
    if (path := local_path(store.url)) is not None:
        with suppress(OSError):  # it is in use
            path.rmdir()


def rights(topic: str, store: Store) -> list[Finding]:
    """Create, create again, read, replace, list and delete a small key, as a run does."""
    folder = f".tmp-doctor-{secrets.token_hex(4)}"
    key = f"{folder}/key"
    try:
        began = time.monotonic()
        store.create(key, b"first")
        create_s = time.monotonic() - began
        findings = [_condition(topic, store, key)]
        store.replace(key, b"second")
        if store.read(key) != b"second" or key not in store.list(folder):
            advice = "the place does not show what was just written; a run cannot rely on it"
            findings.append(Finding(topic, "red", f"{store.url}: stale answers", advice))
        findings += _clock(topic, store, key)
        store.delete([key])
        if store.list(folder):
            advice = "old checkpoints could not be deleted: give this user the right to delete"
            findings.append(Finding(topic, "red", f"{store.url}: {key} is still there", advice))
        text = f"{store.url}: write, read, list, delete; {create_s * 1e3:.1f} ms to create a key"
        return [Finding(topic, "green", text), *findings]
    except (StoreError, FileNotFoundError) as error:
        with suppress(PerdureError):
            store.delete([key])
        advice = "give this user the rights to put, get, list and delete there, or another place"
        return [Finding(topic, "red", str(error), advice)]


def _condition(topic: str, store: Store, key: str) -> Finding:
    try:
        store.create(key, b"of another job")
    except AlreadyExists:
        return Finding(topic, "green", "a second writer of the same key is refused")
    text = f"{store.url} lets a second writer take a key that exists"
    advice = "two jobs on one run could overwrite each other there; start one at a time, or use " \
             "a store that honours If-None-Match"  # fmt: skip
    return Finding(topic, "yellow" if local_path(store.url) is None else "red", text, advice)


def _clock(topic: str, store: Store, key: str) -> list[Finding]:
    off_s = store.modified_s(key) - time.time()
    if abs(off_s) < _CLOCK_S:
        return []
    text = f"the clock of {store.url} is {off_s:+.0f} s from this machine's"
    return [Finding(topic, "yellow", text, "set this machine's clock; S3 refuses 15 minutes")]


def space(topic: str, store: Store, checkpoint_bytes: int | None, kept: int) -> list[Finding]:
    """Compare what is free with what the run's checkpoints need; of object stores nothing is known.

    Args:
        topic: what the place is to the run.
        store: the place.
        checkpoint_bytes: of one checkpoint, if that is known.
        kept: how many lie there at once, with the one that is being written.
    """
    if local_path(store.url) is None:
        return []
    free = _free_bytes(store)
    if checkpoint_bytes is None:
        return [Finding(topic, "green", f"{size(free)} free; the size of a checkpoint is unknown")]
    needed = checkpoint_bytes * kept
    text = f"{size(free)} free, {kept} checkpoints of {size(checkpoint_bytes)} need {size(needed)}"
    if free < needed:
        advice = "checkpoint.keep_last=1 and keep_best=0 need least; or free space, or another disk"
        return [Finding(topic, "red", text, advice)]
    if free < 2 * needed:
        return [Finding(topic, "yellow", text, "others may fill the disk: leave more room")]
    return [Finding(topic, "green", text)]


def _free_bytes(store: Store) -> int:
    folder = Path(store.url).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def speed(topic: str, store: Store) -> tuple[list[Finding], Speed | None]:
    """Measure one durable write and one read, past the page cache where that is possible."""
    local = local_path(store.url) is not None
    total = min(_SPEED_BYTES, _free_bytes(store) // 4) if local else _REMOTE_SPEED_BYTES
    total -= total % (4 << 20)
    if not total:
        return [Finding(topic, "yellow", "too little is free to measure the speed")], None
    buffer = HostBuffer(total, pinned=False)
    buffer.array[:] = secrets.token_bytes(1)[0]
    key = f".tmp-doctor-{secrets.token_hex(4)}/speed"
    try:
        write_s = _timed(lambda: _write(store, key, buffer.view))
        read_s = _timed(lambda: _read(store, key, buffer.view))
    except (StoreError, FileNotFoundError) as error:
        return [Finding(topic, "red", str(error), "the speed could not be measured")], None
    finally:
        with suppress(PerdureError):
            store.delete([key])
    found = Speed(total / write_s, total / read_s)
    text = f"writes {size(found.write_bytes_per_s)}/s, reads {size(found.read_bytes_per_s)}/s"
    if local:
        text += f"; through the page cache, with fsync, {size(_buffered(store, buffer.view))}/s"
    return [Finding(topic, "green", text)], found


def _timed(do: Callable[[], None]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def _write(store: Store, key: str, data: memoryview) -> None:
    new = store.open_new(key, len(data))
    try:
        for start in range(0, len(data), new.part_bytes):
            new.put(start, data[start : start + new.part_bytes])
        new.finish()
    except BaseException:
        new.abort()
        raise


def _read(store: Store, key: str, data: memoryview) -> None:
    for start in range(0, len(data), store.read_bytes):
        store.read_into(key, start, data[start : start + store.read_bytes])


def _buffered(store: Store, data: memoryview) -> float:
    """Return bytes per second of an ordinary file, made durable."""
    path = Path(store.url, f".tmp-doctor-{secrets.token_hex(4)}")
    began = time.perf_counter()
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return len(data) / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)
