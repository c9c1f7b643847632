"""What a checkpoint holds of its optimizers and schedules, as torch's own state dicts have it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.checkpoint import state_tree
from trainer.errors import CheckpointError, ConfigError
from trainer.export.source import Source
from trainer.export.subject import Choices
from trainer.importing.name_matching import clean_names


@dataclass(frozen=True)
class Update:
    """One optimizer of a run, and its schedule."""

    name: str
    """Of the phase that it trains; empty where a step has but one."""
    optimizer: dict[str, Any]
    """What `Optimizer.load_state_dict` takes: parameters are numbers."""
    names: Sequence[Sequence[str]]
    """Group by group, the names of the parameters in the order of their numbers."""
    scheduler: dict[str, Any] | None


def updates(source: Source) -> list[Update]:
    """Return a run's optimizers in the order of its phases; every byte is checked.

    Where there is one optimizer with one group, its parameters are those of `model.parameters()`,
    frozen ones among them; else the groups are as they were in the run, without frozen ones. A
    tensor with several names is one parameter.

    Raises:
        ConfigError: the checkpoint was not written by a run.
        DamagedError: the checkpoint's bytes are wrong.
    """
    objects = source.manifest.objects
    if "run" not in objects or "optimizer" not in objects:
        raise ConfigError(
            f"{source.place}: step {source.commit.step:,} was not written by a run, so it is not "
            "known what its optimizer is; export its weights: format=state_dict"
        )
    stored = objects["optimizer"]
    groups = list(stored["groups"])
    phases = objects.get("phases") or [["", len(groups)]]
    if sum(count for _, count in phases) != len(groups):
        raise CheckpointError(f"{source.place}: the optimizers' groups are not those of {phases}")
    frozen = stored.get("frozen", []) if len(groups) == 1 and not phases[0][0] else []
    clean = clean_names(
        [n.removeprefix("model.") for n in source.manifest.tensors if n.startswith("model.")]
    )
    found = []
    for name, count in phases:
        own, groups = groups[:count], groups[count:]
        names = [list(group["params"]) for group in own]
        for place, frozen_name in frozen:
            names[0].insert(place, frozen_name)
        schedule = objects.get("scheduler")
        if schedule is not None:
            schedule = state_tree.join(schedule[name] if name else schedule, source.reader.fetch)
        cleaned = [[clean[name] for name in group] for group in names]
        found.append(Update(name, _state_dict(source, own, names), cleaned, schedule))
    return found


def _state_dict(
    source: Source, groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]
) -> dict[str, Any]:
    numbers = {name: n for n, name in enumerate(name for group in names for name in group)}
    state: dict[int, dict[str, Any]] = {}
    for full in source.manifest.tensors:
        name, _, key = full.removeprefix("optimizer.").rpartition(".")
        if full.startswith("optimizer.") and name in numbers:
            state.setdefault(numbers[name], {})[key] = source.reader.fetch(full)
    for name, values in source.manifest.objects["optimizer"]["state"].items():
        if name in numbers:
            plain = state_tree.join(values, source.reader.fetch)
            state.setdefault(numbers[name], {}).update(plain)
    packed = []
    for group, own in zip(groups, names, strict=True):
        values = {key: value for key, value in group.items() if key != "params"}
        values = state_tree.join(values, source.reader.fetch)
        packed.append({**values, "params": [numbers[name] for name in own]})
    return {"state": dict(sorted(state.items())), "param_groups": packed}


def refuse_changes(choices: Choices, format: str) -> None:
    """Refuse choices under which the weights would not be those that the optimizers go on with.

    Raises:
        ConfigError: there are some.
    """
    asked = {
        "weights=ema": choices.averaged,
        f"dtype={choices.dtype}": choices.dtype,
        f"part={choices.part}": choices.part,
    }
    for text, is_asked in asked.items():
        if is_asked:
            raise ConfigError(
                f"{text} does not go with format={format}, which is there to go on training: its "
                "optimizers need the weights as they were (averages are in it under a name of "
                "their own). Take format=state_dict or safetensors"
            )
