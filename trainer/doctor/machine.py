"""The machine: versions, devices, memory, signals, clocks."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.cluster.world import World
from trainer.core.formatting import pluralize, size
from trainer.doctor.finding import Finding

_SKEW_S = 1.0
"""Clocks of nodes further apart than this confuse whoever reads their logs together."""


@dataclass(frozen=True)
class Seen:
    """What one rank sees of its machine."""

    host: str
    device: str
    """`cpu`, or the name of the GPU and its memory."""
    versions: Mapping[str, str]
    cores: int
    time_s: float
    """Taken just after a barrier, in seconds since 1970."""


def look(world: World) -> list[Seen]:
    """Return what every rank sees, in rank order. Collective."""
    world.gather(None)  # a barrier: the clocks are read at about the same time
    now = time.time()
    seen = Seen(socket.gethostname(), _device(world.device), _versions(), _cores(), now)
    return world.gather(seen)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    properties: Any = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {size(properties.total_memory)}"


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        nccl: Any = torch.cuda.nccl.version()
        found["nccl"] = ".".join(map(str, nccl))
        found["driver"] = _driver()
    return found


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)  # noqa: S603
    lines = done.stdout.split()
    return lines[0] if lines else "unknown"


def versions(seen: Sequence[Seen]) -> Finding:
    """Judge the versions: new enough, and the same on every rank."""
    first = seen[0]
    shown = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    other = next((i for i, each in enumerate(seen) if each.versions != first.versions), None)
    if other is not None:
        differing = [
            f"{name} {first.versions.get(name)} and {version}"
            for name, version in seen[other].versions.items()
            if first.versions.get(name) != version
        ]
        text = f"rank 0 on {first.host} and rank {other} on {seen[other].host} differ: "
        advice = "install the same versions on every node; a run is not exact across versions"
        return Finding("versions", "red", text + "; ".join(differing), advice)
    numbers = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if numbers < (2, 11):
        return Finding("versions", "red", shown, "install torch 2.11 or newer")
    return Finding("versions", "green", shown)


def devices(seen: Sequence[Seen], wanted: str) -> list[Finding]:
    """Judge what the ranks compute on.

    Args:
        seen: what they see.
        wanted: `launch.device`.
    """
    hosts = list(dict.fromkeys(each.host for each in seen))
    kinds = list(dict.fromkeys(each.device for each in seen))
    ranks = f"{pluralize(len(seen), 'rank')} on {pluralize(len(hosts), 'host')}"
    text = f"{ranks} ({', '.join(hosts[:8])}{', …' * (len(hosts) > 8)}): {'; '.join(kinds)}"
    if wanted == "cuda" and "cpu" in kinds:
        advice = (
            "torch sees no GPU: check the driver, the job's --gpus, and that torch is a CUDA "
            "build; or launch.device=cpu"
        )
        return [Finding("devices", "red", text, advice)]
    if len(kinds) > 1:
        advice = "the slowest kind decides the speed; ask the scheduler for one kind of node"
        return [Finding("devices", "yellow", text, advice)]
    findings = [Finding("devices", "green", text)]
    local = sum(each.host == seen[0].host for each in seen)
    if kinds == ["cpu"] and local > seen[0].cores:
        text = f"{local} ranks share {seen[0].cores} cores of {seen[0].host}"
        advice = f"launch.nproc={seen[0].cores} or fewer, or more CPUs for each task"
        findings.append(Finding("cores", "yellow", text, advice))
    return findings


def clocks(seen: Sequence[Seen]) -> Finding:
    """Judge how far the clocks of the hosts are apart."""
    times = [each.time_s for each in seen]
    skew_s = max(times) - min(times)
    first, last = seen[times.index(min(times))].host, seen[times.index(max(times))].host
    if skew_s <= _SKEW_S:
        return Finding("clocks", "green", f"within {skew_s:.3f} s")
    advice = "switch time synchronisation on (chrony, ntpd): logs and ages would mislead"
    return Finding("clocks", "yellow", f"{first} is {skew_s:.1f} s behind {last}", advice)


def signals(names: Sequence[str]) -> Finding:
    """Send this process each signal that means to leave, and see which arrive. Main thread."""
    arrived: set[int] = set()
    ignored, blocked, lost = [], [], []
    for name in names:
        number = getattr(signal, name)
        before = signal.getsignal(number)
        if before == signal.SIG_IGN:
            ignored.append(name)
        signal.signal(number, lambda number, frame: arrived.add(number))
        if number in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
            blocked.append(name)
        else:
            signal.pthread_kill(threading.main_thread().ident or 0, number)
            if number not in arrived:
                lost.append(name)
        signal.signal(number, before if before is not None else signal.SIG_DFL)
    if blocked or lost:
        advice = "something that started this process blocks them; a preemption would go unnoticed"
        return Finding("signals", "red", f"{', '.join(blocked + lost)} do not arrive", advice)
    if ignored:  # the run installs handlers of its own
        text = f"{', '.join(ignored)} were ignored by what started this process (nohup?); heeded"
        return Finding("signals", "green", text)
    return Finding("signals", "green", f"{', '.join(names)} arrive")
