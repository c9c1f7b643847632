"""The machine: versions, devices, memory, signals, clocks."""

import os
import re
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
"""Maximum difference between the clocks of two nodes, so that their logs can be merged."""


@dataclass(frozen=True)
class RankInfo:
    """Host, device and versions of one rank."""

    host: str
    device: str
    """`cpu`, or the GPU's name and memory."""
    versions: Mapping[str, str]
    cores: int
    time_s: float
    """Unix time just after a barrier."""


def collect(world: World) -> list[RankInfo]:
    """Return the information of every rank, in rank order. Collective."""
    world.gather(None)  # a barrier, so that all clocks are read at about the same time
    now = time.time()
    info = RankInfo(socket.gethostname(), _device(world.device), _versions(), _cores(), now)
    return world.gather(info)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    properties: Any = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {size(properties.total_memory)}"


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        nccl: Any = torch.cuda.nccl.version()
        versions["nccl"] = ".".join(map(str, nccl))
        versions["driver"] = _driver()
    return versions


def _driver() -> str:
    output = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return ((output or "").split() or ["unknown"])[0]


def output_of(*command: str) -> str | None:
    """Return the standard output of a command; None if it is missing, fails or hangs."""
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def check_versions(ranks: Sequence[RankInfo]) -> Finding:
    """Check that versions are recent enough, and the same on every rank."""
    first = ranks[0]
    listing = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    other = next((i for i, info in enumerate(ranks) if info.versions != first.versions), None)
    if other is not None:
        differing = [
            f"{name} {first.versions.get(name)} and {version}"
            for name, version in ranks[other].versions.items()
            if first.versions.get(name) != version
        ]
        text = f"rank 0 on {first.host} and rank {other} on {ranks[other].host} differ: "
        advice = "install the same versions on every node: exact resumption needs them"
        return Finding("versions", "red", text + "; ".join(differing), advice)
    numbers = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if numbers < (2, 11):
        return Finding("versions", "red", listing, "install torch 2.11 or newer")
    return Finding("versions", "green", listing)


def check_devices(ranks: Sequence[RankInfo], device: str) -> list[Finding]:
    """Check the devices of the ranks.

    Args:
        ranks: information of every rank.
        device: `launch.device`.
    """
    hosts = list(dict.fromkeys(info.host for info in ranks))
    kinds = list(dict.fromkeys(info.device for info in ranks))
    counts = f"{pluralize(len(ranks), 'rank')} on {pluralize(len(hosts), 'host')}"
    text = f"{counts} ({', '.join(hosts[:8])}{', …' * (len(hosts) > 8)}): {'; '.join(kinds)}"
    if device == "cuda" and "cpu" in kinds:
        advice = (
            "torch sees no GPU: check the driver, the job's --gpus option, and that torch is a "
            "CUDA build; or set launch.device=cpu"
        )
        return [Finding("devices", "red", text, advice)]
    if len(kinds) > 1:
        advice = "the slowest device limits the speed; request one type of node from the scheduler"
        return [Finding("devices", "yellow", text, advice)]
    findings = [Finding("devices", "green", text)]
    local = sum(info.host == ranks[0].host for info in ranks)
    if kinds == ["cpu"] and local > ranks[0].cores:
        text = f"{local} ranks share {ranks[0].cores} cores of {ranks[0].host}"
        advice = f"set launch.nproc={ranks[0].cores} or less, or request more CPUs per task"
        findings.append(Finding("cores", "yellow", text, advice))
    return findings


def check_clocks(ranks: Sequence[RankInfo]) -> Finding:
    """Check the clock differences between hosts."""
    times = [info.time_s for info in ranks]
    skew_s = max(times) - min(times)
    first, last = ranks[times.index(min(times))].host, ranks[times.index(max(times))].host
    if skew_s <= _SKEW_S:
        return Finding("clocks", "green", f"within {skew_s:.3f} s")
    advice = "enable time synchronization (chrony, ntpd), or timestamps in logs are wrong"
    return Finding("clocks", "yellow", f"{first} is {skew_s:.1f} s behind {last}", advice)


def check_signals(names: Sequence[str]) -> Finding:
    """Send this process each preemption signal and check that it arrives. Main thread."""
    arrived: set[int] = set()
    ignored, blocked, lost = [], [], []
    for name in names:
        number = getattr(signal, name)
        previous = signal.getsignal(number)
        if previous == signal.SIG_IGN:
            ignored.append(name)
        signal.signal(number, lambda number, frame: arrived.add(number))
        if number in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
            blocked.append(name)
        else:
            signal.pthread_kill(threading.main_thread().ident or 0, number)
            if number not in arrived:
                lost.append(name)
        signal.signal(number, previous if previous is not None else signal.SIG_DFL)
    if blocked or lost:
        advice = "unblock them in the parent process, or preemption goes unnoticed"
        return Finding("signals", "red", f"{', '.join(blocked + lost)} do not arrive", advice)
    if ignored:  # the run installs its handlers anyway
        text = f"{', '.join(ignored)} were ignored by the parent (nohup?); the run handles them"
        return Finding("signals", "green", text)
    return Finding("signals", "green", f"{', '.join(names)} arrive")
