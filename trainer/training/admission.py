"""Decision whether and when a new attempt may start, from the records of earlier ones."""

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from trainer.checkpoint import crash_loop
from trainer.checkpoint.replicas import Replicas
from trainer.cluster.world import World
from trainer.config.schema import Run
from trainer.errors import ConfigError, StoreError, StoreRefusedError, print_warning
from trainer.training.identity import identity

_POLL_S = 0.2

Records = list[dict[str, Any]]


def check_stores(run: Run, replicas: Replicas) -> None:
    """Check that the run's stores can be written. Rank 0 only.

    Raises:
        ConfigError: a store rejects writes.
        StoreError: a store does not answer at present.
    """
    for key, store in zip(("run_dir", "checkpoint.mirror"), replicas.stores, strict=False):
        try:
            if warning := store.probe():
                print_warning(warning)
        except StoreError as error:
            advice = (
                ". With checkpoint.mirror=null the run continues without it, if run_dir is complete"
                if store is replicas.mirror
                else ""
            )
            kind = ConfigError if isinstance(error, StoreRefusedError) else StoreError
            text = f"{key}={store.url} cannot be written: {error}{advice}"
            raise kind(text) from None


def admit(
    run: Run, stored: Mapping[str, Any], replicas: Replicas, world: World
) -> tuple[Records, dict[str, Any]]:
    """Wait until the attempt may start. Collective.

    Args:
        run: the configuration.
        stored: the configuration as stored in checkpoints.
        replicas: the run's stores.
        world: the ranks.

    Returns:
        The records of earlier attempts, and values for the new attempt's record.

    Raises:
        CrashLoopError: too many attempts with this configuration and code ended without saving.
    """
    records, facts, wait_s = world.run_on_rank0(lambda: _review(run, stored, replicas, world.size))
    end_s = time.monotonic() + wait_s
    while world.all(time.monotonic() < end_s):
        time.sleep(_POLL_S)
    return records, facts


def _review(
    run: Run, stored: Mapping[str, Any], replicas: Replicas, world_size: int
) -> tuple[Records, dict[str, Any], float]:
    """Return records, values for the new record, and the seconds to wait. Rank 0 only."""
    survey, limits = replicas.survey(), run.launch
    digests = identity(stored, world_size)
    facts = {"resume": run.resume, **digests}
    if limits.forgive:
        return survey.records, {**facts, "forgiven": True}, 0.0
    if not limits.max_attempts_without_progress:
        return survey.records, facts, 0.0
    saved_by = {commit.attempt for commit in survey.with_damaged}
    streak = crash_loop.streak(survey.records, saved_by, digests)
    crash_loop.check(
        streak,
        run.run_dir,
        max_failures=limits.max_attempts_without_progress,
        max_losses=limits.max_losses_without_progress,
    )
    wait_s = streak.wait_s(time.time()) if limits.max_losses_without_progress else 0.0
    if text := streak.loss_text(run.run_dir):
        waiting = f"\nStarting in {wait_s:.0f} s, or at once with launch.forgive=true."
        print_warning(text + (waiting if wait_s else ""))
    return survey.records, facts, wait_s


def check_equal_configs(stored: Mapping[str, Any], world: World) -> None:
    """Raise if the ranks composed different configurations, as under torchrun they may."""
    text = json.dumps(stored, sort_keys=True, default=str)
    digests = world.gather(hashlib.blake2b(text.encode()).hexdigest())

    def check() -> None:
        other = next((rank for rank, d in enumerate(digests) if d != digests[0]), None)
        if other is not None:
            raise ConfigError(
                f"ranks 0 and {other} have different configurations; start every node with the "
                "same command, configuration files and environment"
            )

    world.run_on_rank0(check)
