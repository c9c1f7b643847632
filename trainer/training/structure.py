"""Parameters and buffers of a model are declared when it is built.

Optimizers, DDP and checkpoints need their names: a checkpoint can be loaded only into a model that
has them before its first forward pass. `register_buffer(name, None)` declares a buffer whose shape
is known later.
"""

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from trainer.errors import ConfigError

_MAX_NAMES = 3


def declared(model: nn.Module) -> frozenset[str]:
    """Return the names of the model's parameters and persistent buffers, also of empty ones.

    Raises:
        ConfigError: a parameter or buffer has no shape yet, as in torch's lazy modules, or a module
            has extra state that cannot be restored.
    """
    _check_extra_state(model)
    lazy = [n for n, t in chain(model.named_parameters(), model.named_buffers()) if is_lazy(t)]
    if lazy:
        raise ConfigError(
            f"model: {_listed(lazy)} get their shape in the first forward pass, but optimizers, "
            "DDP and checkpoints need it before. Give the layers their input sizes, or call the "
            "model once in its constructor"
        )
    return frozenset(_names(model)) | frozenset(_empty_buffers(model))


def _check_extra_state(model: nn.Module) -> None:
    """Check that modules with a `get_extra_state` can load what it returns."""
    for name, module in model.named_modules():
        kind, base = type(module), nn.Module
        loads = (kind.set_extra_state, kind._load_from_state_dict, kind.load_state_dict)
        if kind.get_extra_state is not base.get_extra_state and loads == (
            base.set_extra_state, base._load_from_state_dict, base.load_state_dict,
        ):  # fmt: skip
            raise ConfigError(
                f"model: {name or 'the model'} ({kind.__name__}) has get_extra_state() but no "
                "set_extra_state(), so a resumed run would lose its value; define both"
            )


def check(model: nn.Module, names: frozenset[str] | None) -> None:
    """Check that no parameter or persistent buffer was created since `declared`.

    Args:
        model: the plain module.
        names: the result of `declared`; None: nothing is checked.

    Raises:
        ConfigError: one was created.
    """
    late = [name for name in _names(model) if name not in names] if names is not None else []
    if not late:
        return
    trained = dict(model.named_parameters())
    if any(name in trained for name in late):
        raise ConfigError(
            f"model: {_listed(late)} were created in a forward pass, so no optimizer trains them "
            "and their checkpoints cannot be loaded. Create parameters in the model's constructor"
        )
    key = late[0].rpartition(".")[2]
    raise ConfigError(
        f"model: {_listed(late)} were created in a forward pass, so their checkpoints could not be "
        f"loaded. Declare buffers in the constructor: self.register_buffer({key!r}, None), or "
        "with persistent=False if they need not be saved"
    )


def create_buffers(
    model: nn.Module,
    stored: Mapping[str, tuple[Sequence[int], torch.dtype]],
    device: torch.device,
) -> None:
    """Create the declared buffers that are empty in the model but stored in a checkpoint.

    Args:
        model: the plain module.
        stored: shape and dtype of the checkpoint's tensors, by the model's names.
        device: where the buffers are created; their values are undefined.
    """
    for name, (module, key) in _empty_buffers(model).items():
        if name in stored:
            shape, dtype = stored[name]
            setattr(module, key, torch.empty(tuple(shape), dtype=dtype, device=device))


def frozen_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that have parameters, none of which is trained, by name."""
    frozen = {}
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            frozen[name] = module
    return frozen


def statistics_warning(frozen: Mapping[str, nn.Module]) -> str:
    """Return a warning about frozen modules with running statistics; "" if there are none."""
    moving = [
        name
        for name, module in frozen.items()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    ]
    if not moving:
        return ""
    return (
        f"warning: {_listed(moving)}: parameters are frozen, but training still updates the "
        "running statistics; trainer.freeze_eval=true keeps frozen modules in evaluation mode"
    )


def _names(model: nn.Module) -> list[str]:
    """Return the names of parameters and persistent buffers that are not empty.

    Not from `state_dict`, which computes the extra state of modules.
    """
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    buffers = ((name, module._buffers[key]) for name, (module, key) in _buffers(model).items())
    return parameters + [name for name, buffer in buffers if buffer is not None]


def _empty_buffers(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return, by full name, the module and key of each persistent buffer that is None."""
    return {name: at for name, at in _buffers(model).items() if at[0]._buffers[at[1]] is None}


def _buffers(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return, by full name, the module and key of each persistent buffer, also of empty ones.

    torch has no public view of empty ones; a test fails when these attributes change.
    """
    return {
        f"{prefix}.{key}".removeprefix("."): (module, key)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for key in module._buffers
        if key not in module._non_persistent_buffers_set
    }


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
