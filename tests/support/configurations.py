"""Small configurations for tests of the merge and its validation."""

import copy

from omegaconf import OmegaConf

from trainer.config.merge import merge

VALID = {
    "name": "a",
    "run_dir": "runs/a",
    "model": {"_target_": "mine.Net"},
    "data": {"_target_": "mine.Data"},
    "task": {"_target_": "mine.Task"},
    "optimizer": {"_target_": "mine.Sgd"},
}


def composed(**changes):
    """Return a valid configuration with `changes` by dotted key; `__` in a name means a dot."""
    node = OmegaConf.create(copy.deepcopy(VALID))
    for key, value in changes.items():
        OmegaConf.update(node, key.replace("__", "."), value, merge=False, force_add=True)
    return node


def problems_of(**changes):
    """Return {key: text} of the problems of a changed configuration."""
    return {problem.key: problem.text for problem in merge(composed(**changes))[1]}
