"""Credentials of the trackers that need an account."""

import importlib.util
import netrc
import os
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

from trainer.config.schema import Run
from trainer.doctor.finding import Finding

_HOST = "https://api.wandb.ai"


def check_trackers(run: Run, *, is_quick: bool) -> Iterator[Finding]:
    """Check the trackers with `wandb` in the name of their target."""
    for name, node in run.tracker.items():
        if "wandb" in str(node.get("_target_", "")).lower():
            mode = str(node.get("mode") or os.environ.get("WANDB_MODE", ""))
            yield _wandb(f"tracker.{name}", mode, is_quick=is_quick)


def _wandb(topic: str, mode: str, *, is_quick: bool) -> Finding:
    if importlib.util.find_spec("wandb") is None:
        return Finding(topic, "red", "wandb is not installed", "pip install 'perdure[wandb]'")
    if mode in ("offline", "disabled"):
        return Finding(topic, "green", f"{mode}: needs no login")
    host = os.environ.get("WANDB_BASE_URL", _HOST)
    if not (os.environ.get("WANDB_API_KEY") or _has_netrc(urlsplit(host).hostname or "")):
        advice = "run `wandb login`, set WANDB_API_KEY, or set mode: offline"
        return Finding(
            topic, "yellow", f"no API key for {host}; the run would continue without it", advice
        )
    if not is_quick and not _responds(host):
        advice = "on nodes without network access, set mode: offline and run `wandb sync` later"
        return Finding(topic, "yellow", f"{host} does not respond", advice)
    return Finding(topic, "green", f"API key for {host} present")


def _has_netrc(host: str) -> bool:
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators(host) is not None
    return False


def _responds(host: str) -> bool:
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(host, timeout=5).close()  # noqa: S310 (the user's own setting)
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True
