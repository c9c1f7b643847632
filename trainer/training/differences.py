"""Settings that differ from a checkpoint's configuration, and which of them prevent a resume."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.core.nested import flatten
from trainer.errors import closest

_STATE_GROUPS = ("model", "data", "task", "optimizer", "scheduler", "seed")
"""Groups whose values the saved state depends on."""
_STATE_KEYS = ("trainer.global_batch_size", "trainer.freeze")
_OVERRIDABLE = ("optimizer", "scheduler", "trainer.freeze")
"""Settings, also parts of them, that `resume_override` may change in the same run."""
_DATA_LOCATIONS = ("dir", "path", "root", "cache_dir")
"""Data settings that may change: a copy of the data elsewhere is the same data."""
_IGNORED_KEYS = ("name", "run_dir", "resume", "resume_override")
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
        group = self.key.partition(".")[0]
        return group in ("seed", "data") or self.key == "trainer.global_batch_size"

    def is_below(self, key: str) -> bool:
        """Return whether this is the setting `key` or a part of it."""
        return _is_below(self.key, key)

    def is_overridden(self, overrides: Sequence[str]) -> bool:
        """Return whether one of these keys allows the change in the same run."""
        return _may_override(self.key) and any(self.is_below(key) for key in overrides)

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


def check_overrides(
    overrides: Sequence[str], old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[str]:
    """Return a sentence for each key of `resume_override` that names nothing to override.

    Args:
        overrides: the keys.
        old: the checkpoint's configuration.
        new: the present configuration.
    """
    settings = [key for key in {**flatten(old), **flatten(new)} if _may_override(key)]
    problems = []
    for key in overrides:
        if key == "optimizer._target_" or not _may_override(key):
            problems.append(
                f"{key!r} cannot be overridden; use {', '.join(_OVERRIDABLE)}, or a part such as "
                "optimizer.lr"
            )
        elif key not in _OVERRIDABLE and not any(_is_below(name, key) for name in settings):
            problems.append(f"{key!r} is not a setting{closest(key, settings)}")
    return problems


def _may_override(key: str) -> bool:
    return any(_is_below(key, group) for group in _OVERRIDABLE)


def _is_below(key: str, group: str) -> bool:
    return key == group or key.startswith(f"{group}.")


def rejection_text(run_dir: str, step: int, differences: Sequence[Difference]) -> str:
    """Return the error text for a run that cannot resume because of `differences`.

    Args:
        run_dir: directory of the run.
        step: step of the checkpoint.
        differences: those that are not overridden; only those that prevent a resume are listed.
    """
    differences = [difference for difference in differences if difference.prevents_resume]
    allowed = [d.key for d in differences if d.is_overridden(_OVERRIDABLE)]
    only_those = len(allowed) == len(differences)
    override = f"  in this run             resume_override=[{','.join(allowed)}]"
    return "\n".join(
        [
            f"cannot continue {run_dir} from step {step:,} with these changes:",
            *(f"  {difference}" for difference in differences),
            "Undo them to continue this run, or make them:",
            *([override] if only_those else []),
            "  in a new run            name=…",
            f"  from its full state     name=… resume={run_dir}",
            "  from its weights only   name=… init.weights=<file>, exported with",
            f"                          python -m trainer.export {run_dir} format=safetensors",
        ]
    )
