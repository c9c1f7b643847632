"""warmup_cosine against values computed by hand, and replay of schedules."""

import math

import pytest
import torch
from torch.optim import lr_scheduler

from trainer import schedule
from trainer.schedule import warmup_cosine


def new_schedule(**arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    return optimizer, warmup_cosine(optimizer, **arguments)


def rates(optimizer, scheduler, steps):
    """Return the learning rate of each of the next `steps` steps."""
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_warmup_cosine_equals_values_by_hand():
    root = math.sqrt(3) / 2
    half_cosine = [1, (1 + root) / 2, 3 / 4, 1 / 2, 1 / 4, (1 - root) / 2, 0, 0, 0]
    by_hand = [2 * f for f in [1 / 5, 2 / 5, 3 / 5, 4 / 5, *half_cosine]]
    actual = rates(*new_schedule(total_steps=10, warmup_steps=4), 13)
    assert actual == pytest.approx(by_hand, abs=1e-15)


def test_warmup_cosine_without_warmup_falls_from_full_rate_to_floor():
    actual = rates(*new_schedule(total_steps=4, floor=0.1), 6)
    by_hand = [1, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4, 0.55, 0.1 + 0.9 * (2 - math.sqrt(2)) / 4]
    assert actual == pytest.approx([2 * f for f in [*by_hand, 0.1, 0.1]])


def test_warmup_cosine_shorter_than_its_warmup_only_rises():
    actual = rates(*new_schedule(total_steps=2, warmup_steps=4), 3)
    assert actual == pytest.approx([0.4, 0.8, 1.2])


def test_warmup_cosine_scales_the_rate_of_every_group():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [parameters[0]], "lr": 1.0}, {"params": [parameters[1]], "lr": 10.0}]
    optimizer = torch.optim.SGD(groups)
    scheduler = warmup_cosine(optimizer, total_steps=2)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 5.0])


def test_warmup_cosine_reloaded_with_more_steps_follows_the_longer_curve():
    optimizer, scheduler = new_schedule(total_steps=10, warmup_steps=2)
    rates(optimizer, scheduler, 5)
    longer, its_scheduler = new_schedule(total_steps=20, warmup_steps=2)
    its_scheduler.load_state_dict(scheduler.state_dict())
    rates(longer, its_scheduler, 1)  # the current step still has the saved rate
    uninterrupted = rates(*new_schedule(total_steps=20, warmup_steps=2), 20)
    assert rates(longer, its_scheduler, 14) == uninterrupted[6:]


def test_warmup_cosine_state_dict_has_only_numbers():
    _, scheduler = new_schedule(total_steps=10)
    state = scheduler.state_dict()
    assert state["lr_lambdas"] == [None]
    assert state["last_epoch"] == 0


def test_warmup_share_equals_warmup_steps():
    def rates(**warmup):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = warmup_cosine(optimizer, total_steps=40, floor=0.1, **warmup)
        actual = []
        for _ in range(40):
            actual.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return actual

    assert rates(warmup_share=0.25) == rates(warmup_steps=10)


def test_replay_of_plateau_or_hidden_step_returns_none():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer)
    assert schedule.replay(plateau, {"last_epoch": 3}) is None
    constant = lr_scheduler.ConstantLR(optimizer)
    assert schedule.replay(constant, {"hidden": 3}) is None
    assert constant.last_epoch == 0


def test_replay_of_chained_schedulers_advances_all():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    schedulers = [lr_scheduler.CosineAnnealingLR(optimizer, 20), lr_scheduler.StepLR(optimizer, 5)]
    chained = lr_scheduler.ChainedScheduler(schedulers)
    replayed = schedule.replay(chained, {"_schedulers": [{"last_epoch": 7}, {"last_epoch": 7}]})
    assert replayed.groups[0]["lr"] == pytest.approx(
        0.1 * 0.1 * (1 + math.cos(math.pi * 7 / 20)) / 2
    )


@pytest.mark.parametrize("is_tensor", [False, True])  # schedulers change a tensor in place
def test_replay_leaves_the_scheduler_unchanged_until_restore(is_tensor):
    def new():
        lr = torch.tensor(0.1) if is_tensor else 0.1
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr, momentum=0.9)
        return optimizer, lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=20)

    def values(optimizer, scheduler):
        group = optimizer.param_groups[0]
        return scheduler.last_epoch, float(group["lr"]), group["momentum"]

    walked, curve = new(), []
    for _ in range(10):
        curve.append(values(*walked))
        walked[0].step()
        walked[1].step()
    optimizer, scheduler = new()
    states = [schedule.replay(scheduler, {"last_epoch": steps}) for steps in (9, 4)]
    assert values(optimizer, scheduler) == curve[0]
    for state, steps in zip(states, (9, 4), strict=True):
        state.restore(scheduler)
        assert values(optimizer, scheduler) == curve[steps]
