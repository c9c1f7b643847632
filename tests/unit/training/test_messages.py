"""The lines before the first step and after the last."""

import dataclasses

import pytest
import torch
from support.loop_jobs import PER_EPOCH, Net, a_job

from trainer.cluster.world import World
from trainer.config.schema import Checkpoint, Run, Trainer
from trainer.monitoring.timing import Totals
from trainer.training import messages

RECORD = {"attempt": 3, "threads": 2}


def shown(job=None, checkpoint=None, **trainer):
    given = {"global_batch_size": 8, **trainer}
    run = Run(name="mine", run_dir="a", trainer=Trainer(**given),
              checkpoint=Checkpoint(**(checkpoint or {})))  # fmt: skip
    return messages.banner(run, job or a_job(max_steps=3 * PER_EPOCH), RECORD)


def test_a_banner_says_what_is_trained_for_how_long_and_how_it_is_saved():
    adam = a_job(optimizer=lambda m: torch.optim.Adam(m.parameters()), max_steps=15)
    parameters = 6 * 8 + 8 + 8 + 8 + 8 * 3 + 3
    assert shown(adam) == [
        "mine, attempt 3, on 1 rank (cpu, 2 threads)",
        f"  model       {parameters} parameters, all trained",
        "  memory      468 B weights, 396 B gradients, 816 B optimizer state",
        "  batch       8 samples a step = 1 rank x 1 microbatch x 8",
        "  length      15 steps = 3 epochs of 5",
        "  checkpoint  about 11.4 kB, after every epoch and every 600 s; the newest 2 are kept",
    ]


@pytest.mark.parametrize(("limits", "step", "epoch", "said"), [
    ({"max_epochs": 3}, 15, 3, "trainer.max_epochs=6"),
    ({"max_epochs": 1}, 15, 3, "trainer.max_epochs=6"),  # asked for less than there is
    ({"max_epochs": None, "max_steps": 15}, 15, 3, "trainer.max_steps=30"),
    ({"max_epochs": 3, "max_steps": 15}, 15, 3, "trainer.max_steps=30 trainer.max_epochs=6"),
    ({"max_epochs": 9, "max_steps": 15}, 15, 3, "trainer.max_steps=30"),
    ({"max_epochs": 9, "patience_evals": 2}, 15, 3, "trainer.patience_evals=4"),
])  # fmt: skip
def test_what_goes_on_raises_every_limit_that_was_reached(limits, step, epoch, said):
    run = Run(name="mine", run_dir="a", trainer=Trainer(**limits))
    text = messages.finished_text(run, step, epoch)
    assert f"  go on     the same command with {said}\n" in text


def test_frozen_parameters_and_unknown_optimizers_are_told():
    class Mine(torch.optim.SGD):
        pass

    model = Net()
    model.body[0].requires_grad_(False)
    lines = shown(a_job(model=model, optimizer=lambda m: Mine(m.parameters(), lr=0.1)))
    assert lines[1] == "  model       99 parameters, 43 of them trained"
    assert lines[2].endswith("172 B gradients, an unknown size of optimizer state")
    assert lines[5].startswith("  checkpoint  of unknown size, after every epoch")


@pytest.mark.parametrize(("checkpoint", "text"), [
    ({"every_steps": 1500}, "every 1,500 steps and after every epoch and every 600 s"),
    ({"every_epochs": 3, "every_s": None}, "after every 3 epochs; "),
    ({"every_epochs": None, "every_s": None}, "at the end; "),
    ({"keep_last": 1}, "; the newest is kept"),
    ({"metric": "accuracy"}, "; the newest 2 and the best are kept"),
    ({"metric": "accuracy", "keep_best": 0}, "; the newest 2 are kept"),
    ({"metric": "accuracy", "keep_best": 3, "keep_every_steps": 1000},
     "; the newest 2 and the best 3 and every 1,000th step are kept"),
])  # fmt: skip
def test_how_often_it_is_saved_and_what_is_kept(checkpoint, text):
    assert text in shown(checkpoint=checkpoint)[5]


def test_the_length_has_all_that_can_end_it():
    assert shown(a_job(max_steps=5))[4] == "  length      5 steps = 1 epoch of 5"
    assert shown(a_job(max_steps=2))[4] == "  length      2 steps, less than an epoch of 5"
    lines = shown(a_job(max_steps=12), max_time="1:00:00", patience_evals=4)
    assert lines[4] == (
        "  length      12 steps = 2.4 epochs of 5, or 1:00:00 an attempt, or 4 evaluations without "
        "a better one"
    )


def test_the_batch_is_divided():
    job = dataclasses.replace(a_job(), world=World(size=4))
    lines = shown(job, global_batch_size=96, accumulate=3)
    assert lines[3] == "  batch       96 samples a step = 4 ranks x 3 microbatches x 8"
    assert lines[2].endswith(", on each rank")


TOTALS = Totals(
    seconds=20.0, steps=100, samples=6400, step_s=16.0, step_p50_s=0.15, step_p95_s=1.25,
    data_wait_s=2.0, eval_s=3.0, save_stall_s=1.0, peak_bytes=(2_000_000_000, 3_000_000_000),
    mfu=None,
)  # fmt: skip


def test_the_end_says_how_fast_it_was_and_where_the_time_went():
    assert messages.end_lines(TOTALS) == [
        "  speed     320 samples/s; a step 150 ms, 19 of 20 within 1.25 s",
        "  time      10.0 % waiting for data, 15.0 % evaluating, 5.0 % saving",
        "  memory    at most 3 GB (rank 1)",
    ]
    known = dataclasses.replace(TOTALS, mfu=0.4123, step_p50_s=250e-6, peak_bytes=(5_000_000,))
    assert messages.end_lines(known)[0].endswith(
        "a step 250 µs, 19 of 20 within 1.25 s; MFU 41.2 %"
    )
    assert messages.end_lines(known)[2] == "  memory    at most 5 MB"


def test_an_attempt_without_steps_has_nothing_to_say():
    assert messages.end_lines(dataclasses.replace(TOTALS, steps=0)) == []
