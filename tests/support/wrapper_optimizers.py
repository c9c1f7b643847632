"""Optimizers with state outside of `state` and `param_groups`."""

import time
from collections import deque

import torch
from torch.optim import SGD, Optimizer

MOMENTUM = {"lr": 0.05, "momentum": 0.9}


class Wrapper(Optimizer):
    """Delegates to an optimizer that it holds as an attribute."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, {"lr": lr})
        self.base = SGD(self.param_groups, **MOMENTUM)
        self.param_groups = self.base.param_groups

    def step(self, closure=None):
        self.base.step()


class WrapperDict(Wrapper):
    """Its `state_dict` is that of the other optimizer."""

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state_dict):
        self.base.load_state_dict(state_dict)
        self.param_groups = self.base.param_groups


class WrapperShared(Wrapper):
    """Its `state` is that of the other optimizer."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, lr)
        self.state = self.base.state


class Lookahead(Wrapper):
    """Every fourth step, moves to the mean of the weights and older ones."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, lr)
        self.count = 0
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self.base.step()
        self.count += 1
        if self.count % 4 == 0:
            parameters = [p for g in self.param_groups for p in g["params"]]
            for p, slow in zip(parameters, self.slow, strict=True):
                p.copy_(slow.lerp_(p, 0.5))


class LookaheadDict(Lookahead):
    def state_dict(self):
        return {"base": self.base.state_dict(), "slow": self.slow, "count": self.count}

    def load_state_dict(self, state_dict):
        self.base.load_state_dict(state_dict["base"])
        self.param_groups = self.base.param_groups
        self.slow, self.count = state_dict["slow"], state_dict["count"]


class LookaheadHalfDict(LookaheadDict):
    """Forgets the counter."""

    def load_state_dict(self, state_dict):
        super().load_state_dict({**state_dict, "count": 0})


class Counter(SGD):
    """Every fifth update is doubled."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        for _ in range(2 if self.count % 5 == 0 else 1):
            super().step()


class CounterInGroup(SGD):
    def __init__(self, params, lr=0.05):
        super().__init__(params, **MOMENTUM)
        for group in self.param_groups:
            group.setdefault("count", 0)

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
        for _ in range(2 if self.param_groups[0]["count"] % 5 == 0 else 1):
            super().step()


class CounterDict(Counter):
    def state_dict(self):
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict):
        rest = dict(state_dict)
        self.count = rest.pop("count")
        super().load_state_dict(rest)


class History(SGD):
    """Keeps its recent learning rates and gradients."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, **MOMENTUM)
        self.recent = deque(maxlen=3)

    def step(self, closure=None):
        self.recent.append(float(self.param_groups[0]["params"][0].grad.abs().mean()))
        super().step()


class Noise(SGD):
    """Draws from a separate generator."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, **MOMENTUM)
        self.generator = torch.Generator().manual_seed(3)

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn(p.shape, generator=self.generator), alpha=1e-3)


class GlobalNoise(SGD):
    """Draws from the global generator, which checkpoints contain."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn(p.shape), alpha=1e-3)


class Hidden(SGD):
    """Counts in a closure."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, **MOMENTUM)
        count = 0

        def is_due():
            nonlocal count
            count += 1
            return count % 5 == 0

        self.is_due = is_due

    def step(self, closure=None):
        for _ in range(2 if self.is_due() else 1):
            super().step()


class Unstorable(SGD):
    """Keeps an object in its state."""

    def step(self, closure=None):
        super().step()
        self.state[self.param_groups[0]["params"][0]]["handle"] = object()


class Timed(SGD):
    """Measures its time, which no update depends on."""

    def step(self, closure=None):
        began = time.perf_counter_ns()
        super().step()
        self.spent_ns = time.perf_counter_ns() - began


class Bound(SGD):
    """Needs what a trial does not have."""

    def step(self, closure=None):
        if self.param_groups[0]["params"][0].numel() < 9:
            raise RuntimeError("too small")
        super().step()


class OtherKey(SGD):
    """Counts under a key of `state` that is not a parameter."""

    def step(self, closure=None):
        self.state["count"] = self.state.get("count", 0) + 1
        super().step()


class Masked(SGD):
    """Trains only what is small at the start, which is the same in every attempt."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, **MOMENTUM)
        parameters = [p for g in self.param_groups for p in g["params"]]
        self.masks = [(p.detach().abs() < 0.2).to(p.dtype) for p in parameters]

    def step(self, closure=None):
        for p, mask in zip(self.param_groups[0]["params"], self.masks, strict=True):
            p.grad.mul_(mask)
        super().step()


class Setting(SGD):
    """Reads a default only, and changes it when it is restored."""

    def state_dict(self):
        return super().state_dict()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.defaults["is_restored"] = True
