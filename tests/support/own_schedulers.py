"""Schedules outside of torch: some with a correct `state_dict`, others whose state is lost."""

import itertools

from torch.optim.lr_scheduler import LambdaLR, LRScheduler


class Counting(LRScheduler):
    """Halves the learning rate at every `period`-th step, which it counts itself."""

    def __init__(self, optimizer, period=4):
        self.count, self.period = 0, period
        super().__init__(optimizer)

    def get_lr(self):
        self.count += 1
        factor = 0.5 if self.count % self.period == 0 else 1.0
        return [group["lr"] * factor for group in self.optimizer.param_groups]


class Minimal(LRScheduler):
    """Stores nothing but its step; its learning rates are a function of it."""

    def get_lr(self):
        return [base / (1 + self.last_epoch) for base in self.base_lrs]

    def state_dict(self):
        return {"last_epoch": self.last_epoch}


class Renamed(Counting):
    """Stores its count alone, under another name."""

    def state_dict(self):
        return {"steps": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["steps"]


class Plain:
    """Has the two methods, but no class of torch."""

    def __init__(self, optimizer):
        self.optimizer, self.count = optimizer, 0

    def step(self):
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / (1 + self.count)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


class Noisy(LRScheduler):
    """Draws from Python's generator, which a checkpoint contains."""

    def get_lr(self):
        import random

        return [base * random.random() for base in self.base_lrs]


class Filtered(Counting):
    """Filters a plain attribute out."""

    def state_dict(self):
        return {key: value for key, value in super().state_dict().items() if key != "count"}


class Omitted(Counting):
    """Replaces the state by that of the base class's attributes."""

    def state_dict(self):
        return {"last_epoch": self.last_epoch, "base_lrs": self.base_lrs}


class NotLoaded(Counting):
    """Stores its count, but does not load it."""

    def load_state_dict(self, state_dict):
        self.last_epoch = state_dict["last_epoch"]


def hidden(optimizer):
    """Return a schedule with a counter in a closure."""
    calls = itertools.count()
    return LambdaLR(optimizer, lambda step: 0.5 ** (next(calls) // 4))


class Stateless(Plain):
    """Has no `state_dict`."""

    state_dict = None


class Unstorable(Counting):
    """Stores an object of an unknown class."""

    def state_dict(self):
        return {**super().state_dict(), "handle": object()}


class Failing(Counting):
    """Cannot load its own state."""

    def load_state_dict(self, state_dict):
        raise KeyError("count")
