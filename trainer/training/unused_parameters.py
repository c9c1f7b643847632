"""DDP waits for the gradient of every parameter; those that get none are named, if possible early.

https://docs.pytorch.org/docs/stable/notes/ddp.html
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.errors import ConfigError

_UNFINISHED = "Expected to have finished reduction in the prior iteration"
_INDICES = re.compile(r"did not receive grad for rank \d+: ([\d ]+)")
"""DDP lists parameters by their position among those that require gradients. It has no public
attribute for them; a test fails when the text changes."""
_MAX_NAMES = 5


def check(model: nn.Module, loss: Tensor) -> None:
    """Compute the gradient of a first loss, if parts of the model seem to get none.

    Gradients must be None before, and are None afterwards. No communication.

    Args:
        model: the plain module; its parameters that require gradients must all get one.
        loss: its loss (0-dim).

    Raises:
        ConfigError: some parameters get no gradient.
    """
    reached = _reached(loss)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not loss.requires_grad or all(id(p) in reached for p in trained.values()):
        return  # a loss without any gradient fails in its own words
    loss.backward()  # reentrant checkpoints hide parameters
    unused = [name for name, p in trained.items() if p.grad is None]
    for parameter in trained.values():
        parameter.grad = None
    if unused:
        raise _error(unused)


def _reached(loss: Tensor) -> set[int]:
    """Return the `id`s of the tensors whose gradients the graph of `loss` accumulates."""
    reached, seen, pending = set(), set(), [loss.grad_fn]
    while pending:
        node: Any = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        pending += [following for following, _ in node.next_functions]
    return reached


@contextmanager
def named(wrapped: nn.Module) -> Iterator[None]:
    """Turn DDP's error about parameters without a gradient into one with their names.

    DDP finds them at the forward after the step in which they got none.

    Raises:
        ConfigError: instead of DDP's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(wrapped, DistributedDataParallel) or _UNFINISHED not in str(error):
            raise
        trained = [name for name, p in wrapped.module.named_parameters() if p.requires_grad]
        listed = _INDICES.search(str(error))
        unused = [trained[int(index)] for index in listed[1].split()] if listed else []
        raise _error([name.removeprefix("model.") for name in unused]) from None


def _error(names: list[str]) -> ConfigError:
    some = ", ".join(names[:_MAX_NAMES])
    more = len(names) - _MAX_NAMES
    listed = f" ({some}{f' and {more} more' if more > 0 else ''})" if names else ""
    return ConfigError(
        f"parameters get no gradient from the loss{listed}, but DDP waits for the gradients of all "
        "parameters. Set parallel.find_unused_parameters=true, which costs some time per step, or "
        "exclude them with trainer.freeze"
    )
