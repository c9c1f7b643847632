"""A small stored configuration, and copies of it with changed settings."""

import copy

CONFIG = {
    "name": "a", "run_dir": "runs/a", "seed": 0, "resume": "auto",
    "sample": {"shape": [1, 8, 8], "classes": 10},
    "model": {"_target_": "models.cnn.CNN", "hidden": 16, "channels": [4, 8]},
    "data": {"_target_": "trainer.data.mnist.Mnist", "dir": "data/mnist", "mean": 0.5},
    "task": {"_target_": "trainer.task.Classification"},
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
    "scheduler": {},
    "parallel": {"strategy": "ddp"},
    "trainer": {"max_epochs": 3, "global_batch_size": 64, "accumulate": 1, "log_every_steps": 5},
    "launch": {"nproc": "1"},
    "checkpoint": {"every_steps": 5, "metric": "accuracy", "mode": "max"},
    "tracker": {"console": {"_target_": "trainer.tracking.console.Console"}},
    "init": {"weights": None},
}  # fmt: skip


def changed(**changes):
    """Return a copy of CONFIG with dotted changes (`__` means a dot)."""
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        node = config
        *parents, last = key.split("__")
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config
