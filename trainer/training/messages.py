"""What a person reads before the first step and after the last: sizes, lengths, times."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.checkpoint.saver import Saver
from trainer.cluster.stop import Stop, reason_text
from trainer.config.schema import Run
from trainer.core.formatting import size
from trainer.core.state import State
from trainer.errors import RUN_AGAIN
from trainer.monitoring import memory
from trainer.monitoring.timing import Pace, Totals
from trainer.training.job import Job


def count(number: int, noun: str) -> str:
    """Return `1 step`, `2 steps`, `2 batches` and the like."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}" + ("" if number == 1 else plural)


def banner(run: Run, job: Job, record: Mapping[str, Any]) -> list[str]:
    """Return what will be trained, on what, for how long, and how often it is saved.

    Args:
        run: the configuration.
        job: what was built of it.
        record: of this attempt.
    """
    world = job.world
    found = memory.measure(
        job.model,
        [phase.optimizer for phase in job.phases],
        job.ema.averages if job.ema is not None else {},
        world.size,
    )
    trained = "all" if found.trained == found.parameters else f"{found.trained:,} of them"
    where = (
        f"{count(world.size, 'rank')} ({world.device.type}, {count(record['threads'], 'thread')})"
    )
    rows = [
        ("model", f"{found.parameters:,} parameters, {trained} trained"),
        ("memory", _memory(found, world.size)),
        ("batch", _batch(run, world.size)),
        ("length", _length(run, job)),
        ("checkpoint", f"{_about(found)}, {_how_often(run)}"),
    ]
    head = f"{run.name}, attempt {record['attempt']}, on {where}"
    return [head, *(f"  {name:<10}  {text}" for name, text in rows)]


def _memory(found: memory.Sizes, ranks: int) -> str:
    optimizer = (
        "an unknown size of optimizer state"
        if found.optimizer_bytes is None
        else f"{size(found.optimizer_bytes)} optimizer state"
    )
    each = "" if ranks == 1 else ", on each rank"
    return (
        f"{size(found.weights_bytes)} weights, {size(found.gradients_bytes)} gradients, "
        f"{optimizer}{each}"
    )


def _batch(run: Run, ranks: int) -> str:
    total, accumulate = run.trainer.global_batch_size, run.trainer.accumulate
    return (
        f"{total:,} samples a step = {count(ranks, 'rank')} x {count(accumulate, 'microbatch')} x "
        f"{total // ranks // accumulate:,}"
    )


def _length(run: Run, job: Job) -> str:
    per_epoch = job.data.steps_per_epoch
    limit = f", or {run.trainer.max_time} an attempt" if run.trainer.max_time else ""
    stale = f", or {run.trainer.patience_evals} evaluations without a better one"
    if per_epoch is None:
        of_epochs = f" or {count(job.max_epochs, 'epoch')} of the stream" if job.max_epochs else ""
    elif job.max_steps < per_epoch:
        of_epochs = f", less than an epoch of {per_epoch:,}"
    else:
        noun = "epoch" if job.max_steps == per_epoch else "epochs"
        of_epochs = f" = {job.max_steps / per_epoch:.4g} {noun} of {per_epoch:,}"
    return (
        f"{count(job.max_steps, 'step')}{of_epochs}{limit}"
        f"{stale if run.trainer.patience_evals else ''}"
    )


def _about(found: memory.Sizes) -> str:
    if found.checkpoint_bytes is None:
        return "of unknown size"
    return f"about {size(found.checkpoint_bytes)}"


def _how_often(run: Run) -> str:
    wanted = run.checkpoint
    times = [
        *([f"every {wanted.every_steps:,} steps"] if wanted.every_steps else []),
        *(_every_epochs(wanted.every_epochs)),
        *([f"every {wanted.every_s:g} s"] if wanted.every_s else []),
    ]
    kept = "the newest" if wanted.keep_last == 1 else f"the newest {wanted.keep_last}"
    if wanted.metric and wanted.keep_best:
        best = "the best" if wanted.keep_best == 1 else f"the best {wanted.keep_best}"
        kept += f" and {best}"
    if wanted.keep_every_steps:
        kept += f" and every {wanted.keep_every_steps:,}th step"
    often = " and ".join(times) or "at the end"
    return f"{often}; {kept} {'is' if kept == 'the newest' else 'are'} kept"


def _every_epochs(epochs: int | None) -> list[str]:
    if epochs is None:
        return []
    return ["after every epoch"] if epochs == 1 else [f"after every {epochs} epochs"]


def end_lines(totals: Totals) -> list[str]:
    """Return how fast the attempt was, what its time went into, and its memory."""
    if not totals.steps:
        return []
    rate = totals.samples / max(totals.seconds, 1e-9)
    mfu = "" if totals.mfu is None else f"; MFU {100 * totals.mfu:.1f} %"
    shares = [
        (totals.data_wait_s, "waiting for data"),
        (totals.eval_s, "evaluating"),
        (totals.save_stall_s, "saving"),
    ]
    spent = ", ".join(
        f"{100 * part / max(totals.seconds, 1e-9):.1f} % {name}" for part, name in shares
    )
    return [
        f"  speed     {rate:,.0f} samples/s; a step {_time(totals.step_p50_s)}, "
        f"19 of 20 within {_time(totals.step_p95_s)}{mfu}",
        f"  time      {spent}",
        f"  memory    {_peak(totals.peak_bytes)}",
    ]


def _peak(peaks: Sequence[int]) -> str:
    most = max(peaks)
    rank = f" (rank {list(peaks).index(most)})" if len(peaks) > 1 else ""
    return f"at most {size(most)}{rank}"


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
    pace: Pace | None,
    done: bool,
    seconds: float,
) -> str:
    """Return what an attempt says at its end: how far it came, what is saved, how to go on.

    Args:
        run: the configuration.
        state: where it ended.
        saver: knows the newest checkpoint.
        stop: knows why it ended, unless it is done.
        pace: of its steps; None: there were none.
        done: whether the run is at its end.
        seconds: since the attempt's beginning.
    """
    newest = "none" if saver.committed_step is None else f"step {saver.committed_step:,}"
    if not done:
        return (
            f"Stopped by {reason_text(stop.reason)} at step {state.step:,}; newest checkpoint: "
            f"{newest}. Run the same command again to go on (exit code {RUN_AGAIN})."
        )
    figures = "  ".join(f"{name} {_figure(value)}" for name, value in state.metrics.items())
    lines = [f"Finished at step {state.step:,} after {seconds:.1f} s.  {figures}"]
    if saver.committed_step != state.step:
        lines.append(
            f"The last step could NOT be saved; newest checkpoint: {newest}. Run the same command "
            "again to repeat what is missing."
        )
    lines += end_lines(pace.totals()) if pace is not None else []
    return "\n".join([*lines, *_next_steps(run, state.step, state.epoch)])


def _figure(value: float) -> str:
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1e6 else f"{value:.4g}"


def finished_text(run: Run, step: int, epoch: int) -> str:
    """Return what to say of a run that is already at its end."""
    text = (
        f"{run.run_dir} is finished: it is at step {step:,}, as far as this configuration goes. "
        "Nothing to do."
    )
    return "\n".join([text, *_next_steps(run, step, epoch)])


def _next_steps(run: Run, step: int, epoch: int) -> list[str]:
    limits = run.trainer
    further = []
    if limits.max_steps is not None and step >= limits.max_steps:
        further.append(f"trainer.max_steps={2 * step}")
    if limits.max_epochs is not None and epoch >= limits.max_epochs:
        further.append(f"trainer.max_epochs={2 * epoch}")
    if not further and limits.patience_evals is not None:
        further.append(f"trainer.patience_evals={2 * limits.patience_evals}")
    return [
        f"  the run   {run.run_dir}",
        f"  go on     the same command with {' '.join(further)}",
        *([f"  mirror    {run.checkpoint.mirror}"] if run.checkpoint.mirror else []),
        f"  look      {run.run_dir}/metrics.jsonl",
        f"  export    python -m trainer.export {run.run_dir} format=safetensors",
    ]
