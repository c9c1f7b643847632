"""Savers from one flat list of settings, and the steps that they save."""

from dataclasses import fields
from typing import Any

import torch
from support.timelines import start

from trainer import checkpoint
from trainer.checkpoint.lineage import Attempt
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.save_settings import SaveHooks, SavePolicy, SaveTarget
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.state_tree import Content
from trainer.cluster.world import World
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.storage import LocalStore
from trainer.storage.store import Store

RETENTION = ("keep_last", "keep_best", "keep_every_steps", "metric", "mode")
"""Settings of a retention policy."""


def a_saver_for(
    store: Store,
    attempt: Attempt,
    world: World | None = None,
    kind: type[Saver] = Saver,
    **settings: Any,
) -> Saver:
    """Return a saver; `settings` are fields of its target, policy and hooks, or its arguments."""

    def take(group: type) -> dict[str, Any]:
        names = [field.name for field in fields(group) if field.name in settings]
        return {name: settings.pop(name) for name in names}

    target = {"config": {}, **take(SaveTarget)}
    policy, hooks = SavePolicy(**take(SavePolicy)), SaveHooks(**take(SaveHooks))
    target_ = SaveTarget(store=store, world=world or World(), attempt=attempt, **target)
    return kind(target_, policy, hooks=hooks, **settings)


def saver_on(store: LocalStore, attempt: Attempt | None = None, **more: Any) -> Saver:
    more = {"log": lambda text: None, "every": Every(steps=1), "config": {"seed": 5}, **more}
    attempt = attempt or start(store)
    limits = {key: more.pop(key) for key in RETENTION if key in more}
    return a_saver_for(store, attempt, retention=Retention(store, attempt, **limits), **more)


def save_step(saver: Saver, step: int, **metrics: float) -> bool:
    """Save a step; `metrics` are the results of an evaluation at this step."""
    state = State(step=step, samples=8 * step, cursor={"epoch": step // 4, "batch": step % 4})
    if metrics:
        state.last_eval_step, state.metrics = step, metrics
    content = Content(
        tensors={"w": torch.full((9,), float(step))}, objects={"run": state.state_dict()}
    )
    return saver.save(state, lambda: content)


def steps_on(store: LocalStore) -> list[int]:
    return [commit.step for commit in checkpoint.steps(store)]
