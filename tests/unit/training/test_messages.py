"""Banner and end table of a run."""

import dataclasses

import pytest
import torch
from support.loop_jobs import PER_EPOCH, Net, a_job

from trainer.cluster.world import World
from trainer.config.schema import Checkpoint, Run, Trainer
from trainer.core.state import State
from trainer.monitoring.timing import Totals
from trainer.training import messages

RECORD = {"attempt": 3, "threads": 2}


def banner(job=None, checkpoint=None, **trainer):
    """Return the banner of a small run."""
    run = Run(name="mine", run_dir="a", trainer=Trainer(**{"global_batch_size": 8, **trainer}),
              checkpoint=Checkpoint(**(checkpoint or {})))  # fmt: skip
    return messages.banner(run, job or a_job(max_steps=3 * PER_EPOCH), RECORD)


def cell(lines, label):
    """Return the text of the row with this label."""
    (text,) = (line[17:] for line in lines if line[2:].startswith(f"{label}  "))
    return text


def test_banner_lists_model_memory_batch_length_and_checkpoints():
    adam = a_job(optimizer=lambda m: torch.optim.Adam(m.parameters()), max_steps=15)
    parameters = 6 * 8 + 8 + 8 + 8 + 8 * 3 + 3
    assert banner(adam) == [
        "mine, attempt 3: 1 rank (cpu, 2 threads)",
        f"  parameters     {parameters}",
        "  memory         weights 468 B, gradients 396 B, optimizer 816 B",
        "  batch          8 samples = 1 rank x 1 microbatch x 8",
        "  length         15 steps = 3 epochs of 5",
        "  checkpoints    11.4 kB, every epoch, every 600 s",
        "  retention      newest 2",
    ]


@pytest.mark.parametrize(("limits", "step", "epoch", "settings"), [
    ({"max_epochs": 3}, 15, 3, "trainer.max_epochs=6"),
    ({"max_epochs": 1}, 15, 3, "trainer.max_epochs=6"),  # already beyond the limit
    ({"max_epochs": None, "max_steps": 15}, 15, 3, "trainer.max_steps=30"),
    ({"max_epochs": 3, "max_steps": 15}, 15, 3, "trainer.max_steps=30 trainer.max_epochs=6"),
    ({"max_epochs": 9, "max_steps": 15}, 15, 3, "trainer.max_steps=30"),
    ({"max_epochs": 9, "patience_evals": 2}, 15, 3, "trainer.patience_evals=4"),
])  # fmt: skip
def test_continue_command_raises_every_reached_limit(limits, step, epoch, settings):
    run = Run(name="mine", run_dir="a", trainer=Trainer(**limits))
    state = State(step=step, cursor={"epoch": epoch, "batch": 0})
    lines = messages.finished_text(run, state).splitlines()
    assert lines[0] == "a is finished at step 15. Nothing to do."
    assert cell(lines, "continue") == f"same command with {settings}"


@pytest.mark.parametrize(("limits", "stale", "best", "reason"), [
    ({"max_epochs": 9}, 2, {"value": 0.9125, "step": 5},
     "accuracy did not improve in 2 evaluations; best 0.9125 at step 5"),
    ({"max_epochs": 9}, 3, None, "accuracy did not improve in 3 evaluations: it was NaN"),
    ({"max_epochs": 9}, 1, {"value": 0.9125, "step": 5}, ""),
    ({"max_epochs": 3}, 2, {"value": 0.9125, "step": 5}, ""),  # its last epoch, stale or not
    ({"max_epochs": 9, "max_steps": 15}, 2, {"value": 0.9125, "step": 5}, ""),
    ({"max_epochs": 9, "patience_evals": None}, 9, {"value": 0.9125, "step": 5}, ""),
])  # fmt: skip
def test_early_stop_names_the_patience_and_the_best_value(limits, stale, best, reason):
    trainer = Trainer(**{"patience_evals": 2, **limits})
    run = Run(name="a", run_dir="a", trainer=trainer, checkpoint=Checkpoint(metric="accuracy"))
    state = State(step=15, cursor={"epoch": 3, "batch": 0}, best=best, stale_evals=stale)
    assert messages.early_stop_reason(run, state) == reason
    assert (f"Stopped early: {reason}." in messages.finished_text(run, state)) == bool(reason)


def test_banner_shows_frozen_parameters_and_unknown_sizes():
    class Mine(torch.optim.SGD):
        pass

    model = Net()
    model.body[0].requires_grad_(False)
    lines = banner(a_job(model=model, optimizer=lambda m: Mine(m.parameters(), lr=0.1)))
    assert cell(lines, "parameters") == "99 (43 trained)"
    assert cell(lines, "memory").endswith("gradients 172 B, optimizer size unknown")
    assert cell(lines, "checkpoints").startswith("size unknown, every epoch")


@pytest.mark.parametrize(("checkpoint", "text"), [
    ({"every_steps": 1500}, ", every 1,500 steps, every epoch, every 600 s"),
    ({"every_epochs": 3, "every_s": None}, ", every 3 epochs"),
    ({"every_epochs": None, "every_s": None}, ", at the end"),
])  # fmt: skip
def test_banner_lists_checkpoint_intervals(checkpoint, text):
    assert cell(banner(checkpoint=checkpoint), "checkpoints").endswith(text)


@pytest.mark.parametrize(("checkpoint", "text"), [
    ({"keep_last": 1}, "newest 1"),
    ({"metric": "accuracy"}, "newest 2, best 1"),
    ({"metric": "accuracy", "keep_best": 0}, "newest 2"),
    ({"metric": "accuracy", "keep_best": 3, "keep_every_steps": 1000},
     "newest 2, best 3, every 1,000 steps"),
])  # fmt: skip
def test_banner_lists_retention(checkpoint, text):
    assert cell(banner(checkpoint=checkpoint), "retention") == text


def test_banner_length_lists_every_limit():
    assert cell(banner(a_job(max_steps=5)), "length") == "5 steps = 1 epoch of 5"
    assert cell(banner(a_job(max_steps=2)), "length") == "2 steps = 0.4 epochs of 5"
    fork = a_job(max_steps=37, max_epochs=4)  # its parent had epochs of another length
    assert cell(banner(fork), "length") == "37 steps = 4 epochs of 5"
    lines = banner(a_job(max_steps=12), max_time="1:00:00", patience_evals=4)
    assert cell(lines, "length") == (
        "12 steps = 2.4 epochs of 5 or 1:00:00 per attempt or 4 evaluations without improvement"
    )


def test_banner_batch_is_divided_over_ranks_and_microbatches():
    job = dataclasses.replace(a_job(), world=World(size=4))
    lines = banner(job, global_batch_size=96, accumulate=3)
    assert cell(lines, "batch") == "96 samples = 4 ranks x 3 microbatches x 8"
    assert lines[2].endswith(" per rank")


def test_banner_fits_80_columns_with_large_numbers():
    every = {"metric": "loss", "every_steps": 10**6, "keep_every_steps": 10**6}
    assert all(len(line) < 80 for line in banner(checkpoint=every))


TOTALS = Totals(
    seconds=20.0, steps=100, samples=6400, step_s=16.0, step_p50_s=0.15, step_p95_s=1.25,
    data_wait_s=2.0, eval_s=3.0, save_stall_s=1.0, peak_bytes=(2_000_000_000, 3_000_000_000),
    mfu=None,
)  # fmt: skip


def test_end_lines_show_speed_time_and_memory():
    assert messages.end_lines(TOTALS) == [
        "  speed          320 samples/s; step p50 150 ms, p95 1.25 s",
        "  time           data wait 10.0 %, evaluation 15.0 %, checkpoint stalls 5.0 %",
        "  memory         peak 3 GB (rank 1)",
    ]
    totals = dataclasses.replace(TOTALS, mfu=0.4123, step_p50_s=250e-6, peak_bytes=(5_000_000,))
    assert messages.end_lines(totals)[0].endswith("step p50 250 µs, p95 1.25 s, MFU 41.2 %")
    assert messages.end_lines(totals)[2] == "  memory         peak 5 MB"


def test_end_lines_without_steps_are_empty():
    assert messages.end_lines(dataclasses.replace(TOTALS, steps=0)) == []
