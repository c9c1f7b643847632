"""Savers from one flat list of settings."""

from dataclasses import fields
from typing import Any

from trainer.checkpoint.lineage import Attempt
from trainer.checkpoint.save_settings import SaveHooks, SavePolicy, SaveTarget
from trainer.checkpoint.saver import Saver
from trainer.cluster.world import World
from trainer.storage.store import Store


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
