"""Contents of a run's checkpoint: each part is collected and restored by one pair of functions.

| Part        | Tensor names                                  | Object (JSON)              |
| ----------- | --------------------------------------------- | -------------------------- |
| model       | `model.<parameter or buffer>`                 | `model_extra`              |
| optimizer   | `optimizer.<parameter>.<state key>`           | `optimizer`                |
| averages    | `ema.<parameter>`: moving averages, or the    |                            |
|             | weights of the optimizer's evaluation mode    |                            |
| generators  | `rng.<rank>.<generator>`                      |                            |
| schedules   | `scheduler.…`, for tensors in a schedule      | `scheduler`                |
| their start |                                               | `schedule_starts`, if not 0 |
| phases      |                                               | `phases`                   |
| loss scaler | `scaler.…`, for tensors in its state          | `scaler`                   |
| progress    |                                               | `run`: see `core.state`    |
| data size   |                                               | `data`                     |

`checkpoint.state_tree` names the tensors of models and optimizers. Parts that a run does not have
are absent.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainer import schedule
from trainer.checkpoint import state_tree
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.plan import TORCH_DTYPES
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.state_tree import Content
from trainer.core import nested, rng
from trainer.core.state import State
from trainer.data.fingerprint import changed_parts
from trainer.data.source import EvalStream, TrainStream
from trainer.errors import CheckpointError, ConfigError
from trainer.training import modes, structure
from trainer.training.job import Job, Phase
from trainer.training.takeover import SCHEDULER_KEYS, Takeover

if TYPE_CHECKING:
    from trainer.training.resume import Start

MODEL, OPTIMIZER = "model.", "optimizer"
EMA = "ema."
"""Name prefix of averaged parameters."""
RNG = "rng."
SCHEDULER, PHASES, SCALER = "scheduler", "phases", "scaler"
SCHEDULE_STARTS = "schedule_starts"
RUN, DATA, SAMPLES = "run", "data", "samples"
EVALUATION_SAMPLES, FINGERPRINTS = "evaluation_samples", "fingerprints"


def collect(job: Job, state: State) -> Content:
    """Return this rank's part of a checkpoint: live tensors by name, and plain values."""
    content = Content()
    rank0s = content.rank_local if job.world.rank == 0 else {}
    _collect_model(job, content)
    _collect_optimizers(job, content)
    _collect_averages(job, content)
    _collect_generators(job, content)
    _collect_schedules(job, content, rank0s)
    content.objects[SCALER] = state_tree.split(job.scaler.state_dict(), SCALER, rank0s)
    content.objects[RUN] = state.state_dict()
    _collect_data(job, content)
    return content


def restore(job: Job, start: "Start", manifest: Manifest, reader: Reader) -> State:
    """Restore what `collect` stored into the job; return the state of the run.

    No collectives: call it on every rank, then let the ranks vote. Schedules come before the
    optimizers, since a replayed schedule sets values that the stored ones replace; generators
    come last, since everything before may draw from them.

    Raises:
        DamagedError: bytes of the checkpoint do not match their checksum.
        CheckpointError: the checkpoint does not fit this model or optimizer.
        ConfigError: the training data has another number of samples than the run's.
    """
    takeover = start.takeover
    state = _restore_state(manifest, takeover)
    data_moved = _restore_data(job, start, manifest, state)
    _set_length(job, job.last_step(state))
    _restore_model(job, manifest, reader)
    longer = (data_moved or not takeover.same_length) and _depends_on_length(manifest)
    replay = longer and state.step < job.max_steps
    replayed = _restore_schedules(job, takeover, manifest, reader, state.step, replay=replay)
    _restore_optimizers(job, takeover, manifest, reader)
    for scheduler, position in replayed:
        position.restore(scheduler)
    _restore_averages(job, manifest, reader)
    if job.scaler.is_enabled() and manifest.objects.get(SCALER):
        job.scaler.load_state_dict(state_tree.join(manifest.objects[SCALER], reader.fetch))
    _restore_generators(job, takeover, manifest, reader, state.step)
    return state


def stored_state(manifest: Manifest) -> State:
    """Return a checkpoint's state, apart from the tensors.

    Raises:
        CheckpointError: a newer version wrote it.
    """
    state = State()
    state.load_state_dict(dict(manifest.objects[RUN]))
    return state


def former_groups(
    job: Job, phase: Phase, manifest: Manifest, reader: Reader
) -> list[dict[str, Any]]:
    """Return a restored phase's parameter groups with the settings that the checkpoint stores."""
    groups = manifest.objects[OPTIMIZER]["groups"]
    stored = {name: group for group in groups for name in group["params"]}
    names = state_tree.parameter_names(job.model, [phase.optimizer])
    former = []
    for group in phase.optimizer.param_groups:
        trained = (stored[names[id(p)]] for p in group["params"] if names[id(p)] in stored)
        settings = state_tree.join(dict(next(trained, {})), reader.fetch)
        former.append({**group, **settings, "params": group["params"]})
    return former


def phase_names(manifest: Manifest) -> list[str]:
    """Return the names of a checkpoint's phases; one empty name if its step has none."""
    return [name for name, _ in manifest.objects.get(PHASES, [["", 0]])]


def _set_length(job: Job, max_steps: int) -> None:
    """End the run at this step; its schedules are built again if they had another length."""
    if max_steps != job.max_steps:
        job.max_steps = max_steps
        job.phases = [_rescheduled(phase, 0, max_steps) for phase in job.phases]


def _restore_state(manifest: Manifest, takeover: Takeover) -> State:
    state = stored_state(manifest)
    if not takeover.best:
        state.best, state.stale_evals = None, 0
    if not takeover.evaluation:
        state.last_eval_step, state.metrics = 0, {}
    return state


# --- model -------------------------------------------------------------------------------------


def _collect_model(job: Job, content: Content) -> None:
    structure.check(job.model, job.declared)
    state_tree.add_model(content, job.model, with_buffers=job.world.rank == 0)


def _restore_model(job: Job, manifest: Manifest, reader: Reader) -> None:
    shapes = {
        name.removeprefix(MODEL): (entry.shape, TORCH_DTYPES[entry.dtype])
        for name, entry in manifest.tensors.items()
        if name.startswith(MODEL) and entry.alias is None
    }
    structure.create_buffers(job.model, shapes, job.world.device)
    targets = state_tree.model_targets(job.model)
    stored = {name for name in manifest.tensors if name.startswith(MODEL)}
    aliases = {name for name in stored if manifest.tensors[name].alias is not None}
    expected = set(targets) | state_tree.computed_names(job.model)
    missing, unexpected = sorted(set(targets) - stored), sorted(stored - aliases - expected)
    if missing or unexpected:
        raise CheckpointError(
            f"step {manifest.step:,} does not fit this model: missing {missing[:4] or 'nothing'}, "
            f"unexpected {unexpected[:4] or 'nothing'}. A changed model can start from the weights "
            "that fit: init.weights=<safetensors>"
        )
    reader.read(targets)
    state_tree.load_model(job.model, manifest.objects, stored, reader.fetch)


# --- optimizers --------------------------------------------------------------------------------


def _collect_optimizers(job: Job, content: Content) -> None:
    state_tree.add_optimizers(content, job.model, [phase.optimizer for phase in job.phases])


def _restore_optimizers(job: Job, takeover: Takeover, manifest: Manifest, reader: Reader) -> None:
    live = [phase.optimizer for phase in job.phases]
    objects = manifest.objects[OPTIMIZER]
    if takeover.same_parameters:
        state_tree.check_groups(job.model, live, objects["groups"])
    names = state_tree.parameter_names(job.model, live)
    groups = {name: group for group in objects["groups"] for name in group["params"]}
    trained = {names[id(p)] for o in live for g in o.param_groups for p in g["params"]}
    stored = {
        name: (TORCH_DTYPES[entry.dtype], entry.shape)
        for name, entry in manifest.tensors.items()
        if name.startswith(f"{OPTIMIZER}.")
    }
    scalars = objects["state"]
    if not takeover.same_parameters:  # what is frozen now leaves its state behind
        stored = {
            n: e for n, e in stored.items() if n.split(".", 1)[1].rpartition(".")[0] in trained
        }
        scalars = {name: values for name, values in scalars.items() if name in trained}
    state_tree.load_own_state(live, objects, reader.fetch)
    for phase in job.phases:
        _restore_settings(takeover, phase, names, groups, reader)
    slots = state_tree.optimizer_slots(job.model, live, stored)
    reader.read({name: slot.tensor for name, slot in slots.items()})
    state_tree.load_optimizer_state(job.model, live, scalars, slots, reader.fetch)


def _restore_settings(
    takeover: Takeover,
    phase: Phase,
    names: Mapping[int, str],
    groups: Mapping[str, Any],
    reader: Reader,
) -> None:
    """Restore the settings of a phase's parameter groups.

    Args:
        takeover: the decision.
        phase: the phase.
        names: parameter names by `id`.
        groups: the stored group of each parameter that was trained.
        reader: of the checkpoint.
    """
    for index, group in enumerate(phase.optimizer.param_groups):
        members = [names[id(p)] for p in group["params"]]
        values = _stored_settings(takeover, phase, members, groups)
        group |= state_tree.join(values, reader.fetch)
        trained = [name for name in members if name in groups]
        if trained and "lr" not in values and takeover.keeps_schedule(phase.name):
            rate = state_tree.join(groups[trained[0]]["lr"], reader.fetch)
            _reduce_rate(phase, index, rate, takeover.old_rate(trained[0], phase.name))


def _reduce_rate(phase: Phase, index: int, rate: float, base: float | None) -> None:
    """Lower a configured learning rate as a plateau schedule, if any, has lowered the former one.

    Its reductions are known only from the rate itself; other schedules are computed again.

    Args:
        phase: the phase.
        index: of the parameter group.
        rate: the stored learning rate.
        base: the rate at the start of the schedule; None: the optimizer's default.
    """
    if not isinstance(phase.scheduler, ReduceLROnPlateau):
        return
    if base is None:
        base = inspect.signature(type(phase.optimizer)).parameters["lr"].default
    group, floors = phase.optimizer.param_groups[index], phase.scheduler.min_lrs
    floor = min(floors[index % len(floors)], group["lr"])
    group["lr"] = max(group["lr"] * float(rate) / base, floor) if base else group["lr"]


def _stored_settings(
    takeover: Takeover, phase: Phase, members: Sequence[str], groups: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the stored settings that a parameter group takes over.

    Args:
        takeover: the decision.
        phase: the phase of the group.
        members: names of the group's parameters.
        groups: the stored group of each parameter that was trained.
    """
    sources = [groups[name] for name in members if name in groups]
    skipped = {"params"}.union(*(takeover.changed(name, phase.name) for name in members))
    if not takeover.keeps_schedule(phase.name):
        skipped |= set(SCHEDULER_KEYS)
    elif "lr" in skipped:
        skipped.add("initial_lr")
    return {
        key: value
        for key, value in (sources[0].items() if sources else ())
        if key not in skipped and all(source.get(key) == value for source in sources)
    }


# --- averages ----------------------------------------------------------------------------------


def _collect_averages(job: Job, content: Content) -> None:
    for name, average in job.ema.averages.items() if job.ema is not None else ():
        content.tensors[EMA + name] = average
        content.deferrable.add(EMA + name)  # changes just after the weights
    if job.ema is None and (live := modes.averaged_parameters(job)):
        with modes.evaluation_weights(job):
            copies = {EMA + name: parameter.detach().clone() for name, parameter in live.items()}
        content.tensors |= copies
        content.deferrable |= copies.keys()


def _restore_averages(job: Job, manifest: Manifest, reader: Reader) -> None:
    if job.ema is None:
        return
    job.ema.restart()  # for parameters without a stored average
    stored = {EMA + name: average for name, average in job.ema.averages.items()}
    reader.read({name: average for name, average in stored.items() if name in manifest.tensors})


# --- generators --------------------------------------------------------------------------------


def _collect_generators(job: Job, content: Content) -> None:
    for name, value in rng.capture().items():
        content.rank_local[f"{RNG}{job.world.rank}.{name}"] = value


def _restore_generators(
    job: Job, takeover: Takeover, manifest: Manifest, reader: Reader, step: int
) -> None:
    prefix = f"{RNG}{job.world.rank}."
    names = [name for name in manifest.tensors if name.startswith(prefix)]
    if takeover.generators and manifest.world_size == job.world.size and names:
        rng.restore({name.removeprefix(prefix): reader.fetch(name) for name in names})
    else:
        rng.seed_all(rng.derive("rank", job.seed, step, job.world.rank))


# --- schedules ---------------------------------------------------------------------------------


def _collect_schedules(job: Job, content: Content, rank0s: dict[str, Tensor]) -> None:
    states = {p.name: p.scheduler.state_dict() for p in job.phases if p.scheduler is not None}
    if states:
        by_phase = states.get("", states)  # a step without phases stores its only schedule
        content.objects[SCHEDULER] = state_tree.split(by_phase, SCHEDULER, rank0s)
    starts = {p.name: p.schedule_start for p in job.phases if p.schedule_start}
    if starts:
        content.objects[SCHEDULE_STARTS] = starts
    if job.phases[0].name:
        content.objects[PHASES] = [[p.name, len(p.optimizer.param_groups)] for p in job.phases]


def _restore_schedules(
    job: Job, takeover: Takeover, manifest: Manifest, reader: Reader, step: int, *, replay: bool
) -> list[tuple[LRScheduler, schedule.ScheduleState]]:
    """Load the schedules that continue, start the others over at this step.

    Returns the positions of schedules that were computed again, because the length of the run, a
    scheduled setting or the groups changed; they apply after the stored settings.
    """
    stored, replayed = manifest.objects.get(SCHEDULER, {}), []
    starts = manifest.objects.get(SCHEDULE_STARTS, {})
    job.phases = [
        _starting_at(phase, starts.get(phase.name, 0), job.max_steps)
        if takeover.keeps_schedule(phase.name)
        else _starting_at(phase, step, job.max_steps)
        for phase in job.phases
    ]
    for phase in job.phases:
        if phase.scheduler is None or not takeover.keeps_schedule(phase.name):
            continue
        state = state_tree.join(stored[phase.name] if phase.name else stored, reader.fetch)
        groups = manifest.objects[OPTIMIZER]["groups"]
        names = [name for group in groups for name in group["params"]]
        changed = set().union(*(takeover.changed(name, phase.name) for name in names))
        changed &= set(SCHEDULER_KEYS)
        is_new = replay or bool(changed) or not takeover.same_parameters
        position = schedule.replay(phase.scheduler, state) if is_new else None
        if position is not None:
            replayed.append((phase.scheduler, position))
            continue
        phase.scheduler.load_state_dict(state)
        if isinstance(phase.scheduler, ReduceLROnPlateau) and not takeover.plateau_best:
            phase.scheduler._reset()
    job.follow_metric()  # a new or loaded schedule may have another mode
    return replayed


def _starting_at(phase: Phase, step: int, max_steps: int) -> Phase:
    """Return the phase with a schedule from `step` to the end of the run."""
    return phase if step == 0 else _rescheduled(phase, step, max_steps)


def _rescheduled(phase: Phase, step: int, max_steps: int) -> Phase:
    if phase.scheduler is None:
        return phase
    make, scheduler = phase.make_scheduler, phase.scheduler
    if make is not None:
        scheduler = make(max(max_steps - step, 1))
    return replace(phase, scheduler=scheduler, schedule_start=step)


def _depends_on_length(manifest: Manifest) -> bool:
    """Return whether the schedule was built from the length of the run."""
    arguments = nested.leaves(manifest.config.get("scheduler") or {})
    return any(isinstance(v, str) and v in schedule.HORIZON_WORDS for _, v in arguments)


# --- data --------------------------------------------------------------------------------------


def _collect_data(job: Job, content: Content) -> None:
    if job.data.samples is not None:
        content.objects[DATA] = {SAMPLES: job.data.samples}
        if job.evaluation is not None:
            content.objects[DATA][EVALUATION_SAMPLES] = len(job.evaluation.dataset)
        if job.fingerprints:
            content.objects[DATA][FINGERPRINTS] = dict(job.fingerprints)


def _restore_data(job: Job, start: "Start", manifest: Manifest, state: State) -> bool:
    """Move `state` to the start of its epoch, and return True, if a fork has other data.

    Raises:
        ConfigError: the run itself has other data.
    """
    before, now = manifest.objects.get(DATA, {}).get(SAMPLES), job.data.samples
    changed = before is not None and now is not None and before != now
    if changed and not start.is_fork:
        raise ConfigError(
            f"the training data has {now:,} samples but had {before:,} at step {start.step:,}, so "
            "the sample order differs. Restore the data to continue, or start a new run from the "
            f"full state: name=… resume={start.urls[0]}"
        )
    if not start.is_fork:
        job.notes = [*job.notes, *_changed_data(job, manifest)]
    moved = start.is_fork and (changed or not start.takeover.data_position)
    if moved:
        state.cursor = {"epoch": state.cursor["epoch"], "batch": 0}
    return moved


def _changed_data(job: Job, manifest: Manifest) -> list[str]:
    """Return warnings about data of the same run that differs from its checkpoint's."""
    stored, warnings = manifest.objects.get(DATA, {}), []
    before = stored.get(EVALUATION_SAMPLES)
    now = before if job.evaluation is None else len(job.evaluation.dataset)
    if before is not None and now != before:
        warnings.append(
            f"warning: the evaluation data has {now:,} samples but had {before:,} at step "
            f"{manifest.step:,}: new metrics do not compare with earlier ones, nor with the best "
            "value. Restore the data, or start a new run from the full state"
        )
    fingerprints = stored.get(FINGERPRINTS, {})
    for name, data in (("training", job.data), ("evaluation", job.evaluation)):
        if not isinstance(data, (TrainStream, EvalStream)):
            continue
        pair = fingerprints.get(name, {}), job.fingerprints.get(name, {})
        if parts := changed_parts(*pair, data):
            warnings.append(
                f"warning: the {name} data differs from that of step {manifest.step:,}: the same "
                f"samples have another {', '.join(parts[:4])}. Their order or the numbers of the "
                "classes have changed; if these come from a set or an unsorted list of files, sort "
                "them, and resume from a checkpoint before the change"
            )
    return warnings
