"""`format=torchscript`: a file for `torch.jit.load` in Python or C++, without this code."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.errors import ConfigError, closest
from trainer.export.calls import call_of
from trainer.export.contract import ExportError, Runner, is_true
from trainer.export.exported_model import ExportedModel
from trainer.export.tracing import (
    SIGNATURE_FILE,
    Signature,
    TorchRunner,
    Traceable,
    quiet,
    reason,
    traceable,
    value_reads,
)

_METHODS = ("auto", "script", "trace")
_COUNT = 3
"""Samples in the traced call."""


def write(model: ExportedModel, path: Path, options: Mapping[str, str]) -> None:
    """Script or trace the module in eval mode; `auto` traces it if it cannot be scripted."""
    method, freeze = options["method"], is_true(options, "freeze")
    submodules = [name for name in options["traced"].split(",") if name]
    if method not in _METHODS:
        raise ConfigError(f"method={method}: unknown method{closest(method, _METHODS)}")
    if submodules and method == "trace":
        raise ConfigError(
            "traced=… names submodules of a scripted model; use it with method=script"
        )
    with quiet():
        compiled, signature = _compile(model, method, submodules)
        if freeze:
            compiled = torch.jit.freeze(compiled)
        with open(path, "wb") as file:  # given a path, torch would store its name in the file
            extra = {SIGNATURE_FILE: signature.to_text()}
            torch.jit.save(compiled, file, _extra_files=extra)


def open_runner(path: Path, device: str) -> Runner:
    """Load the module, with its signature."""
    extra = {SIGNATURE_FILE: ""}
    with quiet():
        try:
            model = torch.jit.load(path, map_location=device, _extra_files=extra)
        except RuntimeError as error:
            raise ExportError(f"{path} cannot be loaded: {reason(error)}") from None
    return TorchRunner(model, Signature.from_text(extra[SIGNATURE_FILE]), device)


def _compile(model: ExportedModel, method: str, submodules: list[str]) -> tuple[Any, Signature]:
    script_error = ""
    if method != "trace":
        try:
            return _script(model, submodules)
        except ExportError as error:
            if method == "script" or submodules:
                raise
            script_error = f"\nIt cannot be scripted either:\n{error}"
    module = traceable(model, _COUNT)
    return _trace(module, script_error), module.signature


def _script(model: ExportedModel, submodules: list[str]) -> tuple[Any, Signature]:
    call = model.call(_COUNT)
    module = _with_traced(model, submodules) if submodules else model.module
    try:
        scripted = torch.jit.script(module)
    except Exception as error:  # the compiler can raise any type
        raise ExportError(
            f"{type(module).__name__} cannot be scripted: {reason(error)}\nTrace the submodule "
            "that cannot be scripted (traced=its.name) or the complete model (method=trace), or "
            "use format=torch_export"
        ) from None
    return scripted, Signature.of(call, model.outputs, by_name=bool(call.keywords))


def _with_traced(model: ExportedModel, submodules: list[str]) -> nn.Module:
    """Return a copy of the module with these submodules traced, as one call uses them."""
    module, call = copy.deepcopy(model.module), model.call(_COUNT)
    for name in submodules:
        try:
            submodule = module.get_submodule(name)
        except AttributeError:
            names = [key for key, _ in module.named_modules() if key]
            raise ConfigError(
                f"traced={name}: the model has no submodule {name!r}{closest(name, names)}"
            ) from None
        calls: list[tuple[Any, ...]] = []
        handle = submodule.register_forward_pre_hook(
            lambda _, args, calls=calls: calls.append(args)
        )
        with torch.no_grad():
            module(*call.arguments, **call.keywords)
        handle.remove()
        if not calls:
            raise ConfigError(f"traced={name}: the model does not call it for these inputs")
        first = call_of(submodule, calls[0], {})
        signature = Signature(list(first.names), [], [])
        traced = _trace(Traceable(submodule, tuple(first.tensors().values()), signature), "")
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, traced)
    return module


def _trace(model: Traceable, script_error: str) -> Any:
    reads = value_reads(model)
    try:
        with quiet() as caught, torch.no_grad():
            traced = torch.jit.trace(model.module, model.tensors, check_trace=False)
    except Exception as error:  # the model can raise any type while it is traced
        raise ExportError(f"the model cannot be traced: {reason(error)}{script_error}") from None
    lines = {(warning.filename, warning.lineno) for warning in caught} & set(reads)
    if lines:
        code = "".join(f"\n  {name}, line {at}: {reads[name, at]}" for name, at in sorted(lines))
        raise ExportError(
            "a trace would fix control flow that depends on tensor values, and be wrong for other "
            f"inputs:{code}\nmethod=script keeps these branches; torch.where or torch.cond "
            "instead of the branch works in every format, and format=full_model needs neither"
            f"{script_error}"
        )
    return traced
