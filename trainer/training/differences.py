"""Settings that differ from a checkpoint's configuration, and which of them prevent a resume."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.core.nested import flatten

_STATE_GROUPS = ("model", "data", "task", "optimizer", "scheduler", "seed")
"""Groups whose values the saved state depends on."""
_STATE_KEYS = ("trainer.global_batch_size",)
_DATA_LOCATIONS = ("dir", "path", "root", "cache_dir")
"""Data settings that may change: a copy of the data elsewhere is the same data."""
_IGNORED_KEYS = ("name", "run_dir", "resume")
_IGNORED_GROUPS = ("store.", "init.")
_INFERRED_KEYS = ("checkpoint.mode",)
"""Settings whose null means a value that the run computes and stores."""
_ABSENT = "(not set)"


@dataclass(frozen=True)
class Difference:
    """A setting that differs from the checkpoint's."""

    key: str
    old: Any
    new: Any

    @property
    def prevents_resume(self) -> bool:
        """True if the saved state is not valid under the new value."""
        group, _, rest = self.key.partition(".")
        if group == "data" and rest.rpartition(".")[2] in _DATA_LOCATIONS:
            return False
        return group in _STATE_GROUPS or self.key in _STATE_KEYS

    @property
    def moves_data(self) -> bool:
        """True if a saved position in the data points to other samples under the new value."""
        return self.key.partition(".")[0] in ("seed", "data") or self.key in _STATE_KEYS

    def __str__(self) -> str:
        old, new = ("null" if value is None else value for value in (self.old, self.new))
        return f"{self.key}: {old} -> {new}"


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Return the settings that differ, sorted by key.

    Ignores the name and location of a run, and what it was started from.
    """
    before, after = flatten(old), flatten(new)
    pairs = (
        Difference(key, before.get(key, _ABSENT), after.get(key, _ABSENT))
        for key in sorted({*before, *after})
        if key not in _IGNORED_KEYS and not key.startswith(_IGNORED_GROUPS)
    )
    return tuple(
        pair
        for pair in pairs
        if pair.old != pair.new and not (pair.key in _INFERRED_KEYS and pair.new is None)
    )


def optimizer_changes(
    differences: Sequence[Difference], old: Mapping[str, Any], phase: str
) -> dict[str, Any]:
    """Return new values of the optimizer settings that changed for a phase, by name.

    Args:
        differences: between the checkpoint's configuration and the present one.
        old: the checkpoint's configuration.
        phase: the phase's name; its own settings precede general ones. Empty: no phases.
    """
    unchanged = set(flatten(old)) - {difference.key for difference in differences}
    prefix = f"optimizer.phases.{phase}." if phase else "optimizer."
    changes = {}
    for difference in differences:
        key = difference.key.removeprefix(prefix).removeprefix("optimizer.")
        is_general = difference.key == f"optimizer.{key}"
        if difference.key == prefix + key or (is_general and prefix + key not in unchanged):
            changes[key] = difference.new
    return changes


def rejection_text(run_dir: str, step: int, differences: Sequence[Difference]) -> str:
    """Return the error text for a run that cannot resume because of `differences`."""
    return "\n".join(
        [
            f"cannot continue {run_dir} from step {step:,} with these changes:",
            *(f"  {difference}" for difference in differences if difference.prevents_resume),
            "Undo them to continue this run, or start a new one:",
            "  from scratch           name=…",
            f"  from its full state    name=… resume={run_dir}",
            "  from its weights only  name=… init.weights=<file>, exported with",
            f"                         python -m trainer.export {run_dir} format=safetensors",
        ]
    )
