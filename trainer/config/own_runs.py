"""Memory of the runs that this user started, so that their configurations are trusted later.

A run directory cannot vouch for itself: it may be edited, or a copy of another user's. So the start
of a run is recorded in a private file, as a digest of the run's location and configuration.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from trainer.config.schema import ObjectStore
from trainer.core import private_state
from trainer.core.locations import is_remote

_FILE = "runs"


def record(urls: Iterable[str], config: Mapping[str, Any], settings: ObjectStore) -> None:
    """Record that this user started a run. Does nothing if that cannot be stored privately.

    Args:
        urls: of the run's stores.
        config: the configuration, as stored in checkpoints.
        settings: of the stores.
    """
    with suppress(OSError):  # a read-only home
        for url in urls:
            private_state.append_line(_FILE, _digest(url, config, settings))


def is_own(url: str, config: Mapping[str, Any], settings: ObjectStore) -> bool:
    """Return whether this user started a run there with exactly this configuration."""
    try:
        return _digest(url, config, settings) in private_state.read_lines(_FILE)
    except OSError:
        return False


def _digest(url: str, config: Mapping[str, Any], settings: ObjectStore) -> str:
    location = [settings.server, url] if is_remote(url) else [os.path.realpath(url)]
    text = json.dumps([location, config], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()
