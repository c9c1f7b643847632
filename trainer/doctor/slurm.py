"""SLURM's preemption, grace time and requeueing, compared with the time of a save."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence

from trainer.doctor.finding import Finding

_SPARE_S = 5.0
"""Seconds for the current step and the exit, in addition to the save."""


def settings() -> dict[str, str] | None:
    """Return SLURM's configuration, overridden by this job's partition; None without SLURM."""
    if shutil.which("scontrol") is None:
        return None
    output = _scontrol("show", "config")
    if output is None:
        return None
    config = dict(re.findall(r"^(\w+)\s*= *(.*?)\s*$", output, re.MULTILINE))
    partition = os.environ.get("SLURM_JOB_PARTITION")
    output = _scontrol("show", "--oneliner", "partition", *([partition] if partition else []))
    matching = [line for line in (output or "").splitlines() if partition or "Default=YES" in line]
    if matching:
        config |= dict(re.findall(r"(\w+)=(\S+)", matching[0]))
    if (job := os.environ.get("SLURM_JOB_ID")) is not None:
        lead = re.search(
            r"--signal=(?:\w*:)?\w+@(\d+)", _scontrol("write", "batch_script", job, "-") or ""
        )
        config["SignalLead"] = lead[1] if lead else ""
        requeue = re.search(r"Requeue=(\d)", _scontrol("show", "--oneliner", "job", job) or "")
        config["Requeue"] = requeue[1] if requeue else ""
    return config


def _scontrol(*words: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603
            ["scontrol", *words],  # noqa: S607
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def check_slurm(config: dict[str, str] | None, save_s: float | None) -> Sequence[Finding]:
    """Check that preempted and timed-out jobs have time to save, and are requeued.

    Args:
        config: the result of `settings`.
        save_s: duration of a save, if measured.
    """
    if config is None:
        return [Finding("slurm", "green", "not installed")]
    if not config:
        text = "scontrol is installed, but does not respond"
        return [Finding("slurm", "yellow", text, "check that this node is part of the cluster")]
    findings = [_preemption(config), _grace(config, save_s)]
    if "SignalLead" in config:
        findings += [_lead(config["SignalLead"], save_s), _requeue(config)]
    elif config.get("JobRequeue") == "0":
        advice = "submit with --requeue, as slurm/train.sbatch does"
        findings.append(Finding("requeue", "yellow", "JobRequeue=0", advice))
    return findings


def _preemption(config: dict[str, str]) -> Finding:
    mode = config.get("PreemptMode", "unknown")
    text = f"PreemptMode={mode} in {config.get('PartitionName', 'the cluster')}"
    if "SUSPEND" in mode:
        advice = "a suspended job keeps its memory and may lose its peers; prefer REQUEUE"
        return Finding("preemption", "yellow", text, advice)
    if "CANCEL" in mode:
        advice = "set --signal in the batch script: the run saves, and the script requeues it"
        return Finding("preemption", "yellow", text, advice)
    return Finding("preemption", "green", text)


def _grace(config: dict[str, str], save_s: float | None) -> Finding:
    grace = int(re.sub(r"\D", "", config.get("GraceTime", "")) or 0)
    wait = int(re.sub(r"\D", "", config.get("KillWait", "")) or 30)
    seconds = grace + wait
    text = f"{seconds} s between the signal and SIGKILL (GraceTime {grace}, KillWait {wait})"
    if save_s is None:
        return Finding("grace", "green", text)
    if seconds < save_s + _SPARE_S:
        advice = (
            f"a save takes {save_s:.0f} s, so the job loses work since its last checkpoint; lower "
            f"checkpoint.every_s, or request GraceTime={save_s + _SPARE_S - wait:.0f}"
        )
        return Finding("grace", "yellow", text, advice)
    return Finding("grace", "green", f"{text} is enough: a save takes {save_s:.1f} s")


def _lead(lead: str, save_s: float | None) -> Finding:
    if not lead:
        advice = "add #SBATCH --signal=USR2@180, so that the run exits before its time limit"
        return Finding("signal", "yellow", "the batch script has no --signal", advice)
    text = f"the job is signaled {lead} s before its time limit"
    if save_s is not None and int(lead) < 2 * save_s + _SPARE_S:
        advice = f"a save takes {save_s:.0f} s: set --signal=USR2@{3 * save_s + 60:.0f}"
        return Finding("signal", "yellow", text, advice)
    return Finding("signal", "green", text)


def _requeue(config: dict[str, str]) -> Finding:
    if config.get("Requeue") == "0":
        advice = "submit with --requeue, or use slurm/chain.sh"
        return Finding("requeue", "yellow", "this job cannot be requeued", advice)
    return Finding("requeue", "green", "this job can be requeued")
