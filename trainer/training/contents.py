"""Contents of a run's checkpoint: each part is collected and restored by one pair of functions.

| Part        | Tensor names                                  | Object (JSON)              |
| ----------- | --------------------------------------------- | -------------------------- |
| model       | `model.<parameter or buffer>`                 | `model_extra`              |
| optimizer   | `optimizer.<parameter>.<state key>`           | `optimizer`                |
| averages    | `ema.<parameter>`                             |                            |
| generators  | `rng.<rank>.<generator>`                      |                            |
| schedules   | `scheduler.…`, for tensors in a schedule      | `scheduler`                |
| phases      |                                               | `phases`                   |
| loss scaler | `scaler.…`, for tensors in its state          | `scaler`                   |
| progress    |                                               | `run`: see `core.state`    |
| data size   |                                               | `data`                     |

`checkpoint.state_tree` names the tensors of models and optimizers. Parts that a run does not have
are absent.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from trainer import schedule
from trainer.checkpoint import state_tree
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.plan import TORCH_DTYPES
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.state_tree import Content
from trainer.core import rng
from trainer.core.state import State
from trainer.errors import CheckpointError, ConfigError
from trainer.training.job import Job, Phase

if TYPE_CHECKING:
    from trainer.training.resume import Start

MODEL, OPTIMIZER = "model.", "optimizer"
EMA = "ema."
"""Name prefix of averaged parameters."""
RNG = "rng."
SCHEDULER, PHASES, SCALER = "scheduler", "phases", "scaler"
RUN, DATA, SAMPLES = "run", "data", "samples"
_LENGTH_SETTINGS = ("trainer.max_steps", "trainer.max_epochs")

_Changes = dict[str, Any]
"""New values of changed optimizer settings, by name."""


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
    state = State()
    state.load_state_dict(dict(manifest.objects[RUN]))
    data_moved = _restore_data(job, start, manifest, state)
    _restore_model(job, manifest, reader)
    changes = [_changed_settings(phase, start) for phase in job.phases]
    longer = data_moved or start.differs(*_LENGTH_SETTINGS)
    replay = longer and _depends_on_length(manifest) and state.step < job.max_steps
    replayed = _restore_schedules(job, start, manifest, reader, changes, replay=replay)
    _restore_optimizers(job, manifest, reader, changes)
    for scheduler, position in replayed:
        position.restore(scheduler)
    _restore_averages(job, manifest, reader)
    if job.scaler.is_enabled() and manifest.objects.get(SCALER):
        job.scaler.load_state_dict(state_tree.join(manifest.objects[SCALER], reader.fetch))
    _restore_generators(job, manifest, reader, state.step)
    return state


# --- model -------------------------------------------------------------------------------------


def _collect_model(job: Job, content: Content) -> None:
    state_tree.add_model(content, job.model, with_buffers=job.world.rank == 0)


def _restore_model(job: Job, manifest: Manifest, reader: Reader) -> None:
    targets = state_tree.model_targets(job.model)
    stored = {name for name in manifest.tensors if name.startswith(MODEL)}
    aliases = {name for name in stored if manifest.tensors[name].alias is not None}
    missing, unexpected = sorted(set(targets) - stored), sorted(stored - aliases - set(targets))
    if missing or unexpected:
        raise CheckpointError(
            f"step {manifest.step:,} does not fit this model: missing {missing[:4] or 'nothing'}, "
            f"unexpected {unexpected[:4] or 'nothing'}. A changed model can start from the weights "
            "that fit: init.weights=<safetensors>"
        )
    reader.read(targets)
    state_tree.load_model(job.model, manifest.objects, reader.fetch)


# --- optimizers --------------------------------------------------------------------------------


def _collect_optimizers(job: Job, content: Content) -> None:
    state_tree.add_optimizers(content, job.model, [phase.optimizer for phase in job.phases])


def _restore_optimizers(
    job: Job, manifest: Manifest, reader: Reader, changes: Sequence[_Changes]
) -> None:
    stored = {
        name: (TORCH_DTYPES[entry.dtype], entry.shape)
        for name, entry in manifest.tensors.items()
        if name.startswith(f"{OPTIMIZER}.")
    }
    optimizers = [phase.optimizer for phase in job.phases]
    slots = state_tree.optimizer_slots(job.model, optimizers, stored)
    reader.read({name: slot.tensor for name, slot in slots.items()})
    objects = manifest.objects[OPTIMIZER]
    state_tree.load_optimizers(job.model, optimizers, objects, slots, reader.fetch)
    for optimizer, changed in zip(optimizers, changes, strict=True):
        for group in optimizer.param_groups:
            group |= changed | ({"initial_lr": changed["lr"]} if "lr" in changed else {})


def _changed_settings(phase: Phase, start: "Start") -> _Changes:
    """Return the optimizer settings that a fork's configuration changes; they replace the stored.

    Values are the optimizer's own: a removed setting has torch's default.
    """
    (group, *_), defaults = phase.optimizer.param_groups, phase.optimizer.defaults
    changed = start.changed_optimizer_settings(phase.name)
    return {key: defaults.get(key, value) for key, value in changed.items() if key in group}


# --- averages ----------------------------------------------------------------------------------


def _collect_averages(job: Job, content: Content) -> None:
    for name, average in job.ema.averages.items() if job.ema is not None else ():
        content.tensors[EMA + name] = average
        content.deferrable.add(EMA + name)  # changes just after the weights


def _restore_averages(job: Job, manifest: Manifest, reader: Reader) -> None:
    if job.ema is None:
        return
    if any(name.startswith(EMA) for name in manifest.tensors):
        reader.read({EMA + name: average for name, average in job.ema.averages.items()})
    else:
        job.ema.restart()  # the run had no averages


# --- generators --------------------------------------------------------------------------------


def _collect_generators(job: Job, content: Content) -> None:
    for name, value in rng.capture().items():
        content.rank_local[f"{RNG}{job.world.rank}.{name}"] = value


def _restore_generators(job: Job, manifest: Manifest, reader: Reader, step: int) -> None:
    prefix = f"{RNG}{job.world.rank}."
    names = [name for name in manifest.tensors if name.startswith(prefix)]
    if manifest.world_size == job.world.size and names:
        rng.restore({name.removeprefix(prefix): reader.fetch(name) for name in names})
    else:
        rng.seed_all(rng.derive("rank", job.seed, step, job.world.rank))


# --- schedules ---------------------------------------------------------------------------------


def _collect_schedules(job: Job, content: Content, rank0s: dict[str, Tensor]) -> None:
    states = {p.name: p.scheduler.state_dict() for p in job.phases if p.scheduler is not None}
    if states:
        by_phase = states.get("", states)  # a step without phases stores its only schedule
        content.objects[SCHEDULER] = state_tree.split(by_phase, SCHEDULER, rank0s)
    if job.phases[0].name:
        content.objects[PHASES] = [[p.name, len(p.optimizer.param_groups)] for p in job.phases]


def _restore_schedules(
    job: Job,
    start: "Start",
    manifest: Manifest,
    reader: Reader,
    changes: Sequence[_Changes],
    *,
    replay: bool,
) -> list[tuple[LRScheduler, schedule.ScheduleState]]:
    """Load the schedules; with `replay`, return the positions of those replayed instead.

    A schedule starts over if its settings or its learning rate are changed.
    """
    if start.differs(SCHEDULER):
        return []
    stored, replayed = manifest.objects.get(SCHEDULER, {}), []
    for phase, changed in zip(job.phases, changes, strict=True):
        if phase.scheduler is None or "lr" in changed:
            continue
        state = state_tree.join(stored[phase.name] if phase.name else stored, reader.fetch)
        position = schedule.replay(phase.scheduler, state) if replay else None
        if position is None:
            phase.scheduler.load_state_dict(state)
        else:
            replayed.append((phase.scheduler, position))
    return replayed


def _depends_on_length(manifest: Manifest) -> bool:
    """Return whether the schedule was built from the length of the run."""
    arguments = manifest.config.get("scheduler") or {}
    return any(isinstance(v, str) and v in schedule.HORIZON_WORDS for v in arguments.values())


# --- data --------------------------------------------------------------------------------------


def _collect_data(job: Job, content: Content) -> None:
    if job.data.samples is not None:
        content.objects[DATA] = {SAMPLES: job.data.samples}


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
    moved = start.is_fork and (changed or any(d.moves_data for d in start.differences))
    if moved:
        state.cursor = {"epoch": state.cursor["epoch"], "batch": 0}
    return moved
