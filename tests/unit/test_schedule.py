"""warmup_cosine against a table made by hand, and on a longer road after a reload."""

import math

import pytest
import torch
from torch.optim import lr_scheduler

from trainer import schedule
from trainer.schedule import warmup_cosine


def made(**arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    return optimizer, warmup_cosine(optimizer, **arguments)


def rates(optimizer, scheduler, steps):
    """Return the learning rate of each of the next `steps` steps."""
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_the_whole_curve_with_a_warmup():
    root = math.sqrt(3) / 2
    half_cosine = [1, (1 + root) / 2, 3 / 4, 1 / 2, 1 / 4, (1 - root) / 2, 0, 0, 0]
    by_hand = [2 * f for f in [1 / 5, 2 / 5, 3 / 5, 4 / 5, *half_cosine]]
    found = rates(*made(total_steps=10, warmup_steps=4), 13)
    assert found == pytest.approx(by_hand, abs=1e-15)


def test_without_a_warmup_it_begins_at_the_full_rate_and_ends_at_the_floor():
    found = rates(*made(total_steps=4, floor=0.1), 6)
    by_hand = [1, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4, 0.55, 0.1 + 0.9 * (2 - math.sqrt(2)) / 4]
    assert found == pytest.approx([2 * f for f in [*by_hand, 0.1, 0.1]])


def test_a_run_shorter_than_its_warmup_only_rises():
    found = rates(*made(total_steps=2, warmup_steps=4), 3)
    assert found == pytest.approx([0.4, 0.8, 1.2])


def test_every_group_keeps_its_own_rate():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [parameters[0]], "lr": 1.0}, {"params": [parameters[1]], "lr": 10.0}]
    optimizer = torch.optim.SGD(groups)
    scheduler = warmup_cosine(optimizer, total_steps=2)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 5.0])


def test_after_a_reload_a_longer_run_follows_the_longer_curve_from_there():
    optimizer, scheduler = made(total_steps=10, warmup_steps=2)
    rates(optimizer, scheduler, 5)
    longer, its_scheduler = made(total_steps=20, warmup_steps=2)
    its_scheduler.load_state_dict(scheduler.state_dict())
    rates(longer, its_scheduler, 1)  # the step in hand still has the rate that was saved
    uninterrupted = rates(*made(total_steps=20, warmup_steps=2), 20)
    assert rates(longer, its_scheduler, 14) == uninterrupted[6:]


def test_only_numbers_are_kept_in_a_checkpoint():
    _, scheduler = made(total_steps=10)
    kept = scheduler.state_dict()
    assert kept["lr_lambdas"] == [None]
    assert kept["last_epoch"] == 0


def test_a_rise_may_be_given_as_a_share_of_the_run():
    def rates(**warmup):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = warmup_cosine(optimizer, total_steps=40, floor=0.1, **warmup)
        found = []
        for _ in range(40):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    assert rates(warmup_share=0.25) == rates(warmup_steps=10)


def test_what_is_no_function_of_the_step_is_not_replayed():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer)
    assert schedule.replay(plateau, {"last_epoch": 3}) is None
    constant = lr_scheduler.ConstantLR(optimizer)
    assert schedule.replay(constant, {"hidden": 3}) is None
    assert constant.last_epoch == 0


def test_chained_schedules_are_replayed_too():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    inner = [lr_scheduler.CosineAnnealingLR(optimizer, 20), lr_scheduler.StepLR(optimizer, 5)]
    chained = lr_scheduler.ChainedScheduler(inner)
    place = schedule.replay(chained, {"_schedulers": [{"last_epoch": 7}, {"last_epoch": 7}]})
    assert place.groups[0]["lr"] == pytest.approx(0.1 * 0.1 * (1 + math.cos(math.pi * 7 / 20)) / 2)


@pytest.mark.parametrize("is_tensor", [False, True])  # one is changed in place
def test_to_replay_leaves_the_schedule_as_it_was_until_its_place_is_taken(is_tensor):
    def new():
        lr = torch.tensor(0.1) if is_tensor else 0.1
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr, momentum=0.9)
        return optimizer, lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=20)

    def now(optimizer, scheduler):
        group = optimizer.param_groups[0]
        return scheduler.last_epoch, float(group["lr"]), group["momentum"]

    walked, curve = new(), []
    for _ in range(10):
        curve.append(now(*walked))
        walked[0].step()
        walked[1].step()
    optimizer, scheduler = new()
    places = [schedule.replay(scheduler, {"last_epoch": steps}) for steps in (9, 4)]
    assert now(optimizer, scheduler) == curve[0]
    for place, steps in zip(places, (9, 4), strict=True):
        place.take(scheduler)
        assert now(optimizer, scheduler) == curve[steps]
