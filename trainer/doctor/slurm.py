"""What SLURM does to jobs: preemption, grace, requeueing, compared with what a save takes."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence

from trainer.doctor.finding import Finding

_SPARE_S = 5.0
"""What a step in hand and leaving take besides the save."""


def settings() -> dict[str, str] | None:
    """Return SLURM's configuration, with this job's partition over it; None without SLURM."""
    if shutil.which("scontrol") is None:
        return None
    shown = _ask("show", "config")
    if shown is None:
        return None
    found = dict(re.findall(r"^(\w+)\s*= *(.*?)\s*$", shown, re.MULTILINE))
    partition = os.environ.get("SLURM_JOB_PARTITION")
    shown = _ask("show", "--oneliner", "partition", *([partition] if partition else []))
    chosen = [line for line in (shown or "").splitlines() if partition or "Default=YES" in line]
    if chosen:
        found |= dict(re.findall(r"(\w+)=(\S+)", chosen[0]))
    if (job := os.environ.get("SLURM_JOB_ID")) is not None:
        lead = re.search(
            r"--signal=(?:\w*:)?\w+@(\d+)", _ask("write", "batch_script", job, "-") or ""
        )
        found["SignalLead"] = lead[1] if lead else ""
        requeue = re.search(r"Requeue=(\d)", _ask("show", "--oneliner", "job", job) or "")
        found["Requeue"] = requeue[1] if requeue else ""
    return found


def _ask(*words: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603
            ["scontrol", *words],  # noqa: S607
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def judge(found: dict[str, str] | None, save_s: float | None) -> Sequence[Finding]:
    """Say whether preempted and ended jobs have the time to save, and come back.

    Args:
        found: what `settings` returned.
        save_s: what a save takes, as far as it was measured.
    """
    if found is None:
        return [Finding("slurm", "green", "not here")]
    if not found:
        text = "scontrol is here, but does not answer"
        return [Finding("slurm", "yellow", text, "is this node a part of the cluster?")]
    findings = [_preemption(found), _grace(found, save_s)]
    if "SignalLead" in found:
        findings += [_lead(found["SignalLead"], save_s), _requeue(found)]
    elif found.get("JobRequeue") == "0":
        advice = "submit with --requeue, as slurm/train.sbatch does"
        findings.append(Finding("requeue", "yellow", "JobRequeue=0", advice))
    return findings


def _preemption(found: dict[str, str]) -> Finding:
    mode = found.get("PreemptMode", "unknown")
    text = f"PreemptMode={mode} in {found.get('PartitionName', 'the cluster')}"
    if "SUSPEND" in mode:
        advice = "a suspended job holds its memory and may lose its peers; prefer REQUEUE"
        return Finding("preemption", "yellow", text, advice)
    if "CANCEL" in mode:
        advice = "the batch script saves and requeues itself when it is told in time (75)"
        return Finding("preemption", "yellow", text, advice)
    return Finding("preemption", "green", text)


def _grace(found: dict[str, str], save_s: float | None) -> Finding:
    grace = int(re.sub(r"\D", "", found.get("GraceTime", "")) or 0)
    wait = int(re.sub(r"\D", "", found.get("KillWait", "")) or 30)
    seconds = grace + wait
    text = f"{seconds} s between the signal and SIGKILL (GraceTime {grace}, KillWait {wait})"
    if save_s is None:
        return Finding("grace", "green", text)
    if seconds < save_s + _SPARE_S:
        advice = (
            f"a save takes {save_s:.0f} s: the last interval's checkpoint will have to do; save "
            f"often (checkpoint.every_s), or ask for GraceTime={save_s + _SPARE_S - wait:.0f}"
        )
        return Finding("grace", "yellow", text, advice)
    return Finding("grace", "green", f"{text} is enough: a save takes {save_s:.1f} s")


def _lead(lead: str, save_s: float | None) -> Finding:
    if not lead:
        advice = "add #SBATCH --signal=USR2@180, so that the run leaves before its time is over"
        return Finding("signal", "yellow", "the batch script asks for no signal", advice)
    text = f"the job is told {lead} s before its time is over"
    if save_s is not None and int(lead) < 2 * save_s + _SPARE_S:
        advice = f"a save takes {save_s:.0f} s: ask for --signal=USR2@{3 * save_s + 60:.0f}"
        return Finding("signal", "yellow", text, advice)
    return Finding("signal", "green", text)


def _requeue(found: dict[str, str]) -> Finding:
    if found.get("Requeue") == "0":
        advice = "submit with --requeue; else use slurm/chain.sh"
        return Finding("requeue", "yellow", "this job cannot be requeued", advice)
    return Finding("requeue", "green", "this job can be requeued")
