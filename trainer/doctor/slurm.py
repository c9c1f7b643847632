"""SLURM's preemption, grace time and requeueing, compared with the time of a save."""

import os
import re
import shutil
from collections.abc import Sequence

from trainer.doctor.finding import Finding
from trainer.doctor.machine import output_of

_SPARE_S = 5.0
"""Seconds for the current step and the exit, in addition to the save."""

_SIGNAL = r"(?:--signal[= ]|\bSignal=)[\"']?(?:\w+:)?\w+(?:@(\d+))?"
_DEFAULT_LEAD_S = "60"
"""Lead of a --signal without a time, seconds."""


def settings() -> dict[str, str] | None:
    """Return SLURM's configuration, overridden by this job's partition.

    None without SLURM; empty if scontrol does not respond in a job.
    """
    if shutil.which("scontrol") is None:
        return None
    output = output_of("scontrol", "show", "config")
    if output is None:  # outside of a job: the programs are installed, but no cluster is set up
        return {} if "SLURM_JOB_ID" in os.environ else None
    config = dict(re.findall(r"^(\w+)\s*= *(.*?)\s*$", output, re.MULTILINE))
    partition = os.environ.get("SLURM_JOB_PARTITION")
    output = output_of(
        "scontrol", "show", "--oneliner", "partition", *([partition] if partition else [])
    )
    matching = [line for line in (output or "").splitlines() if partition or "Default=YES" in line]
    if matching:
        config |= dict(re.findall(r"(\w+)=(\S+)", matching[0]))
    if (job := os.environ.get("SLURM_JOB_ID")) is not None:
        config |= _job_settings(job)
    return config


def _job_settings(job: str) -> dict[str, str]:
    """Return Requeue, TimeLimit and SignalLead (seconds) of a job; empty texts if unknown."""
    description = output_of("scontrol", "show", "--oneliner", "job", job) or ""
    matches = {key: re.search(rf"\b{key}=(\S+)", description) for key in ("Requeue", "TimeLimit")}
    texts = {key: match[1] if match else "" for key, match in matches.items()}
    return {**texts, "SignalLead": _signal_lead(job, description)}


def _signal_lead(job: str, description: str) -> str:
    """Return the seconds between the signal and the time limit of a job; empty if unknown.

    Options of sbatch come from its command line, then from SBATCH_SIGNAL, then from the script.
    SLURM 22 and 23 show the command line in the accounting only.
    """
    script = output_of("scontrol", "write", "batch_script", job, "-") or ""
    options = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    submitted = output_of("sacct", "-X", "-n", "-P", "-o", "SubmitLine%1000", "-j", job) or ""
    variable = os.environ.get("SBATCH_SIGNAL", "")
    sources = [description, submitted, f"--signal={variable}", *options]
    for text in sources:
        if lead := re.search(_SIGNAL, text):
            return lead[1] or _DEFAULT_LEAD_S
    return ""


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
        findings += [_lead(config, save_s), _requeue(config)]
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


def _lead(config: dict[str, str], save_s: float | None) -> Finding:
    lead, limit = config["SignalLead"], config.get("TimeLimit", "")
    if limit == "UNLIMITED":
        return Finding("signal", "green", "the job has no time limit")
    if not lead:
        advice = "add #SBATCH --signal=USR2@180, so that the run exits before its time limit"
        return Finding("signal", "yellow", "no --signal is set for this job", advice)
    text = f"the job is signaled {lead} s before its time limit"
    limit_s = _seconds(limit)
    if limit_s is not None:
        text += f" of {limit}"
        if int(lead) >= limit_s:
            advice = "request a longer --time, or a shorter lead such as --signal=USR2@60"
            return Finding("signal", "yellow", f"{text}, so at its start", advice)
    if save_s is not None and int(lead) < 2 * save_s + _SPARE_S:
        advice = f"a save takes {save_s:.0f} s: set --signal=USR2@{3 * save_s + 60:.0f}"
        return Finding("signal", "yellow", text, advice)
    return Finding("signal", "green", text)


def _seconds(limit: str) -> float | None:
    """Return the seconds of a SLURM time such as 1-02:03:04; None for any other text."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _requeue(config: dict[str, str]) -> Finding:
    if config.get("Requeue") == "0":
        advice = "submit with --requeue, or use slurm/chain.sh"
        return Finding("requeue", "yellow", "this job cannot be requeued", advice)
    return Finding("requeue", "green", "this job can be requeued")
