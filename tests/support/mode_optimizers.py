"""Optimizers that train other weights than they evaluate."""

import torch


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD: trains y, evaluates the average x, and stores z."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "count": 0, "is_training": False})

    def train(self):
        self._move(True, lambda beta: 1 - beta)

    def eval(self):
        self._move(False, lambda beta: 1 - 1 / beta)

    @torch.no_grad()
    def _move(self, is_training, weight):
        for group in self.param_groups:
            if group["is_training"] != is_training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight(group["beta"]))
                group["is_training"] = is_training

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["is_training"], "call train() first"
            group["count"] += 1
            ratio, lr, beta = 1 / group["count"], group["lr"], group["beta"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, ratio).add_(p.grad, alpha=lr * (beta * (1 - ratio) - 1))
                z.sub_(p.grad, alpha=lr)


class Attribute(torch.optim.SGD):
    """Keeps its mode outside of its state; evaluates halved weights."""

    mode = "eval"

    def train(self):
        self._scale("train", 2.0)

    def eval(self):
        self._scale("eval", 0.5)

    @torch.no_grad()
    def _scale(self, mode, factor):
        if self.mode != mode and self.state:
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(factor)
        self.mode = mode

    def step(self, closure=None):
        assert self.mode == "train", "call train() first"
        return super().step(closure)
