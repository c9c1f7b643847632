"""Whether trackers that need an account have one."""

import importlib.util
import netrc
import os
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

from trainer.config.schema import Run
from trainer.doctor.finding import Finding

_HOST = "https://api.wandb.ai"


def examine(run: Run, *, is_quick: bool) -> Iterator[Finding]:
    """Look at the trackers of a run whose target has `wandb` in its name."""
    for name, node in run.tracker.items():
        if "wandb" in str(node.get("_target_", "")).lower():
            mode = str(node.get("mode") or os.environ.get("WANDB_MODE", ""))
            yield _wandb(f"tracker.{name}", mode, is_quick=is_quick)


def _wandb(topic: str, mode: str, *, is_quick: bool) -> Finding:
    if importlib.util.find_spec("wandb") is None:
        return Finding(topic, "red", "wandb is not installed", "pip install 'perdure[wandb]'")
    if mode in ("offline", "disabled"):
        return Finding(topic, "green", f"{mode}: no login is needed")
    host = os.environ.get("WANDB_BASE_URL", _HOST)
    if not (os.environ.get("WANDB_API_KEY") or _has_netrc(urlsplit(host).hostname or "")):
        advice = "run `wandb login`, set WANDB_API_KEY, or choose mode: offline"
        return Finding(
            topic, "yellow", f"no key for {host}; the run would go on without it", advice
        )
    if not is_quick and not _answers(host):
        advice = "nodes without a network: mode: offline, and `wandb sync` later"
        return Finding(topic, "yellow", f"{host} does not answer", advice)
    return Finding(topic, "green", f"a key for {host} is there")


def _has_netrc(host: str) -> bool:
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators(host) is not None
    return False


def _answers(host: str) -> bool:
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(host, timeout=5).close()  # noqa: S310 (the user's own setting)
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True
