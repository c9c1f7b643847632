"""Origin of each part of the state: the checkpoint or the configuration.

The table in docs/configuration.md, under Resume, is this module in words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from trainer.training.differences import Difference

SCHEDULER_KEYS = (
    "lr", "initial_lr", "max_lr", "min_lr", "momentum", "betas", "max_momentum", "base_momentum",
)  # fmt: skip
"""Settings of a parameter group that torch's schedulers write."""
_GROUPING_KEYS = ("groups", "phases", "names")
_LENGTH_SETTINGS = ("trainer.max_steps", "trainer.max_epochs")
_ABSENT = object()


@dataclass(frozen=True)
class Takeover:
    """Parts of the state that a start takes from the checkpoint; the others are as configured."""

    old: Mapping[str, Any]
    """`optimizer` in the checkpoint's configuration."""
    new: Mapping[str, Any]
    """`optimizer` in the present configuration."""
    best: bool
    """Best value and evaluations since then. False: they start over."""
    plateau_best: bool
    """Best value of a plateau schedule. False: it starts over, since new values do not compare."""
    evaluation: bool
    """Newest evaluation. False: it is due again."""
    data_position: bool
    """Position within the epoch. False: the epoch starts over."""
    generators: bool
    """Generator states. False: derived from the seed and the step."""
    schedule: bool
    """Schedule. False: it starts at this step, over the remaining ones."""
    lr_restarts_schedule: bool
    """True in a fork: a phase with another base learning rate starts its schedule over."""
    same_parameters: bool
    """True if the optimizer must hold the checkpoint's parameters in the same groups. False: newly
    trained parameters start with fresh optimizer state."""
    same_length: bool
    """True if the run's length is unchanged."""
    phases: Sequence[str]
    """Phases of the checkpoint. Others start their schedule at this step."""

    def changed(self, parameter: str, phase: str) -> set[str]:
        """Return the names of optimizer settings that the configuration changes for a parameter."""
        old, new = (_settings(node, parameter, phase) for node in (self.old, self.new))
        return {key for key in {*old, *new} if old.get(key, _ABSENT) != new.get(key, _ABSENT)}

    def node(self, phase: str) -> dict[str, Any]:
        """Return the configured target and arguments of a phase's optimizer."""
        return _base(self.new, phase)

    def old_rate(self, parameter: str, phase: str) -> float | None:
        """Return the learning rate in the checkpoint's configuration; None if it sets none."""
        return _settings(self.old, parameter, phase).get("lr")

    def keeps_schedule(self, phase: str) -> bool:
        """Return whether the phase's schedule continues from the checkpoint."""
        base = [_base(node, phase).get("lr", _ABSENT) for node in (self.old, self.new)]
        restarts = self.lr_restarts_schedule and base[0] != base[1]
        return self.schedule and phase in self.phases and not restarts

    def lines(self) -> list[str]:
        """Return a line per part that is not taken from the checkpoint."""
        parts = {
            "best value, patience": (self.best, "start over"),
            "evaluation": (self.evaluation, "due again"),
            "data": (self.data_position, "from the start of the epoch"),
            "generators": (self.generators, "derived from the seed and the step"),
            "parameter groups": (
                self.same_parameters,
                "as configured; fresh optimizer state for new parameters",
            ),
        }
        lines = [f"{name}: {text}" for name, (is_taken, text) in parts.items() if not is_taken]
        restarted = [name for name in self.phases if not self.keeps_schedule(name)]
        if restarted:
            is_all = len(restarted) == len(self.phases)
            names = "" if is_all else f" of {', '.join(restarted)}"
            text = "starts at this step, at the configured learning rate, over the remaining steps"
            lines.append(f"schedule{names}: {text}")
        return lines


def decide(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    differences: Sequence[Difference],
    *,
    is_fork: bool,
    phases: Sequence[str] = ("",),
) -> Takeover:
    """Decide what a resume or a fork takes from the checkpoint.

    Args:
        old: the checkpoint's configuration.
        new: the present configuration.
        differences: between them. In a resume, those that prevent it must be overridden.
        is_fork: whether the checkpoint belongs to another run.
        phases: names of the checkpoint's phases; `""` if its step has none.
    """

    def differs(*keys: str) -> bool:
        return any(d.is_below(key) for d in differences for key in keys)

    same_metric = not differs("checkpoint.metric", "checkpoint.mode")
    follows_loss = all(_followed_metric(config) == "loss" for config in (old, new))
    evaluation = not (is_fork and differs("data", "task", "model"))
    return Takeover(
        old=old.get("optimizer") or {},
        new=new.get("optimizer") or {},
        best=not is_fork and same_metric,
        plateau_best=evaluation and (same_metric or follows_loss),
        evaluation=evaluation,
        data_position=not (is_fork and any(d.moves_data for d in differences)),
        generators=not (is_fork and differs("seed")),
        schedule=not differs("scheduler"),
        lr_restarts_schedule=is_fork,
        same_parameters=not differs("trainer.freeze", "optimizer.groups"),
        same_length=not differs(*_LENGTH_SETTINGS),
        phases=phases,
    )


def _followed_metric(config: Mapping[str, Any]) -> str:
    """Return the metric that a plateau schedule follows."""
    return str((config.get("checkpoint") or {}).get("metric") or "loss")


def _base(optimizer: Mapping[str, Any], phase: str) -> dict[str, Any]:
    """Return the settings of a phase, without those of groups."""
    settings = {**optimizer, **optimizer.get("phases", {}).get(phase, {})}
    return {key: value for key, value in settings.items() if key not in _GROUPING_KEYS}


def _settings(optimizer: Mapping[str, Any], parameter: str, phase: str) -> dict[str, Any]:
    """Return the settings of a parameter: its phase's, then those of the first matching group."""
    rules = optimizer.get("groups") or []
    rule: Mapping[str, Any] = next(
        (r for r in rules if any(fnmatchcase(parameter, n) for n in r["names"])), {}
    )
    group = {key: value for key, value in rule.items() if key not in _GROUPING_KEYS}
    return {**_base(optimizer, phase), **group}


EVERYTHING = decide({}, {}, (), is_fork=False)
"""The choice of a resume without changes."""
