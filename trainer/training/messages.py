"""Terminal output of a run: banner, resume lines, and the table at the end."""

from collections.abc import Mapping
from typing import Any

from trainer.checkpoint.saver import Saver
from trainer.cluster.stop import Stop, reason_text
from trainer.config.schema import Run
from trainer.core.formatting import pluralize, size
from trainer.core.state import State
from trainer.errors import RUN_AGAIN
from trainer.monitoring import memory
from trainer.monitoring.timing import Timing, Totals
from trainer.training.boundary import leaves_out_evaluation
from trainer.training.job import Job
from trainer.training.modes import averaged_parameters
from trainer.training.resume import Start


def row(label: str, text: str) -> str:
    """Return one line of the banner or the end table."""
    return f"  {label:<13}  {text}"


def banner(run: Run, job: Job, record: Mapping[str, Any]) -> list[str]:
    """Return lines with the model, memory, batch, length and checkpoints of an attempt.

    Args:
        run: the configuration.
        job: the job built from it.
        record: the attempt's record.
    """
    world, trainer = job.world, run.trainer
    averages = job.ema.averages if job.ema is not None else averaged_parameters(job)
    optimizers = [phase.optimizer for phase in job.phases]
    sizes = memory.measure(job.model, optimizers, averages, world.size)
    frozen = sizes.trained < sizes.parameters
    optimizer, checkpoint = (
        "size unknown" if number is None else size(number)
        for number in (sizes.optimizer_bytes, sizes.checkpoint_bytes)
    )
    microbatch = trainer.global_batch_size // world.size // trainer.accumulate
    return [
        f"{run.name}, attempt {record['attempt']}: {pluralize(world.size, 'rank')} "
        f"({world.device.type}, {pluralize(record['threads'], 'thread')})",
        row("parameters", f"{sizes.parameters:,}" + f" ({sizes.trained:,} trained)" * frozen),
        row(
            "memory",
            f"weights {size(sizes.weights_bytes)}, gradients {size(sizes.gradients_bytes)}, "
            f"optimizer {optimizer}" + " per rank" * (world.size > 1),
        ),
        row(
            "batch",
            f"{pluralize(trainer.global_batch_size, 'sample')} = {pluralize(world.size, 'rank')} x "
            f"{pluralize(trainer.accumulate, 'microbatch')} x {microbatch:,}",
        ),
        row("length", _length(run, job)),
        row("checkpoints", f"{checkpoint}, {_intervals(run)}"),
        row("retention", _retention(run)),
    ]


def _length(run: Run, job: Job) -> str:
    per_epoch, trainer = job.data.steps_per_epoch, run.trainer
    limits = [pluralize(job.max_steps, "step")]
    if per_epoch is not None:
        ends_with_epoch = job.max_epochs and job.max_steps != job.step_limit
        epochs = job.max_epochs if ends_with_epoch else job.max_steps / per_epoch
        limits[0] += f" = {epochs:.4g} {'epoch' if epochs == 1 else 'epochs'} of {per_epoch:,}"
    elif job.max_epochs:
        limits.append(f"{pluralize(job.max_epochs, 'epoch')} of the stream")
    if trainer.max_time:
        limits.append(f"{trainer.max_time} per attempt")
    if trainer.patience_evals:
        limits.append(f"{pluralize(trainer.patience_evals, 'evaluation')} without improvement")
    return " or ".join(limits)


def _intervals(run: Run) -> str:
    steps, epochs = run.checkpoint.every_steps, run.checkpoint.every_epochs
    intervals = [
        *(["every step" if steps == 1 else f"every {steps:,} steps"] if steps else []),
        *(["every epoch" if epochs == 1 else f"every {epochs:,} epochs"] if epochs else []),
        *([f"every {run.checkpoint.every_s:g} s"] if run.checkpoint.every_s else []),
    ]
    return ", ".join(intervals) or "at the end"


def _retention(run: Run) -> str:
    settings = run.checkpoint
    kinds = [
        f"newest {settings.keep_last}",
        *([f"best {settings.keep_best}"] if settings.metric and settings.keep_best else []),
        *([f"every {settings.keep_every_steps:,} steps"] if settings.keep_every_steps else []),
    ]
    return ", ".join(kinds)


def resume_lines(
    job: Job,
    start: Start,
    state: State,
    record: Mapping[str, Any],
    earlier: Mapping[str, Any],
    *,
    mirror: str | None,
) -> list[str]:
    """Return lines about the checkpoint that an attempt starts from.

    Args:
        job: the job.
        start: the checkpoint.
        state: the state restored from it.
        record: the attempt's record.
        earlier: record of the attempt that saved the checkpoint.
        mirror: URL of the mirror, if the checkpoint is read from there.
    """
    lines = [*(f"warning: skipped checkpoint: {text}" for text in start.skipped), *start.notes]
    if start.manifest is None or start.commit is None:
        return lines
    remaining = pluralize(job.max_steps - state.step, "step")
    verb = f"forking {start.urls[0]}/{start.commit.folder}" if start.is_fork else "resuming"
    source = f" of {mirror}" if mirror else ""
    lines.append(f"{verb} from step {state.step:,}{source}; {remaining} left")
    lines += filter(None, [job.data.rereads(state.cursor)])
    if leaves_out_evaluation(job, state):
        lines.append(
            f"warning: the evaluation of step {state.step:,} is left out, because the previous "
            "attempt ended during it. Give attempts more time, or evaluate fewer samples"
        )
    if start.differences:
        lines.append("changed settings:")
        lines += [f"  {difference}" for difference in start.differences]
    if parts := start.takeover.lines():
        lines += ["not from the checkpoint:", *(f"  {line}" for line in parts)]
    changes = [
        f"{key} {earlier.get(key)} -> {record[key]}"
        for key in ("world_size", "threads", "device", "versions")
        if earlier.get(key) != record[key]
    ]
    if changes:
        lines.append(f"not bit-exact from here on, because of {'; '.join(changes)}")
    return lines


def end_lines(totals: Totals) -> list[str]:
    """Return the speed, time and memory of an attempt."""
    if not totals.steps:
        return []
    seconds = max(totals.seconds, 1e-9)
    p50, p95 = _time(totals.step_p50_s), _time(totals.step_p95_s)
    mfu = "" if totals.mfu is None else f", MFU {100 * totals.mfu:.1f} %"
    parts = {
        "data wait": totals.data_wait_s,
        "evaluation": totals.eval_s,
        "checkpoint stalls": totals.save_stall_s,
    }
    peak = max(totals.peak_bytes)
    rank = f" (rank {totals.peak_bytes.index(peak)})" if len(totals.peak_bytes) > 1 else ""
    return [
        row("speed", f"{totals.samples / seconds:,.0f} samples/s; step p50 {p50}, p95 {p95}{mfu}"),
        row("time", ", ".join(f"{name} {100 * s / seconds:.1f} %" for name, s in parts.items())),
        row("memory", f"peak {size(peak)}{rank}"),
    ]


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def end_text(
    run: Run,
    state: State,
    saver: Saver,
    stop: Stop,
    timing: Timing,
    done: bool,
    seconds: float,
) -> str:
    """Return the final text of an attempt: its last step, its newest checkpoint, next commands.

    Args:
        run: the configuration.
        state: the state at the end.
        saver: the source of the newest checkpoint's step.
        stop: the source of the reason, unless the run is done.
        timing: the attempt's timing.
        done: whether the run has reached its end.
        seconds: time spent in training.
    """
    newest = "none" if saver.committed_step is None else f"step {saver.committed_step:,}"
    if not done:
        return (
            f"Stopped by {reason_text(stop.reason)} at step {state.step:,}; newest checkpoint: "
            f"{newest}.\nRun the same command again to continue (exit code {RUN_AGAIN})."
        )
    metrics = "  ".join(f"{name} {_number(value)}" for name, value in state.metrics.items())
    lines = [f"Finished at step {state.step:,} after {seconds:.1f} s.  {metrics}"]
    lines += _early_stop_lines(run, state)
    if state.skipped:
        text = f"{state.skipped:,} of {pluralize(state.step, 'step')}: gradients were not finite"
        lines.append(row("skipped", text))
    if saver.committed_step != state.step:
        lines.append(
            f"warning: the last step was not saved; newest checkpoint: {newest}.\n"
            "Run the same command again to repeat the missing steps."
        )
    lines += end_lines(timing.totals())
    return "\n".join([*lines, *_next_steps(run, state)])


def early_stop_reason(run: Run, state: State) -> str:
    """Return why a complete run ended before its last step, with its best value; else ''."""
    limits, metric = run.trainer, run.checkpoint.metric
    if limits.patience_evals is None or state.stale_evals < limits.patience_evals:
        return ""
    if _reached(limits.max_steps, state.step) or _reached(limits.max_epochs, state.epoch):
        return ""
    text = f"{metric} did not improve in {pluralize(state.stale_evals, 'evaluation')}"
    if state.best is None:
        return f"{text}: it was NaN"
    return f"{text}; best {_number(state.best['value'])} at step {state.best['step']:,}"


def _reached(limit: int | None, position: int) -> bool:
    return limit is not None and position >= limit


def _early_stop_lines(run: Run, state: State) -> list[str]:
    reason = early_stop_reason(run, state)
    return [f"Stopped early: {reason}."] if reason else []


def _number(value: float) -> str:
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1e6 else f"{value:.4g}"


def finished_text(run: Run, state: State) -> str:
    """Return the text for a run that was already finished when started."""
    return "\n".join(
        [
            f"{run.run_dir} is finished at step {state.step:,}. Nothing to do.",
            *_early_stop_lines(run, state),
            *_next_steps(run, state),
        ]
    )


def _next_steps(run: Run, state: State) -> list[str]:
    limits = run.trainer
    longer = []
    if _reached(limits.max_steps, state.step):
        longer.append(f"trainer.max_steps={2 * state.step}")
    if _reached(limits.max_epochs, state.epoch):
        longer.append(f"trainer.max_epochs={2 * state.epoch}")
    if not longer and limits.patience_evals is not None:
        longer.append(f"trainer.patience_evals={2 * limits.patience_evals}")
    return [
        row("run directory", run.run_dir),
        *([row("mirror", run.checkpoint.mirror)] if run.checkpoint.mirror else []),
        row("metrics", f"{run.run_dir}/metrics.jsonl"),
        row("continue", f"same command with {' '.join(longer)}"),
        row("export", f"python -m trainer.export {run.run_dir} format=safetensors"),
    ]
