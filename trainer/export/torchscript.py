"""`format=torchscript`: what `torch.jit.load` runs, without this project's code, also from C++."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.errors import ConfigError, closest
from trainer.export.calls import call_of
from trainer.export.contract import ExportError, Runner, is_true
from trainer.export.subject import Subject
from trainer.export.tracing import (
    INTERFACE,
    Interface,
    TorchRunner,
    Traceable,
    decisions,
    interface,
    quiet,
    reason,
    traceable,
)

SUFFIX = ".ts"
OPTIONS: Mapping[str, str] = {"method": "auto", "traced": "", "freeze": "false"}
HELP: Mapping[str, str] = {
    "method": "script, which keeps branches and loops; trace, which follows one call; or auto",
    "traced": "submodules, with commas between, that are traced inside a model that is scripted",
    "freeze": "true folds the weights into the graph, for inference alone",
}
_METHODS = ("auto", "script", "trace")
_COUNT = 3
"""Samples of the call that is traced."""


def write(subject: Subject, path: Path, options: Mapping[str, str]) -> None:
    """Script or trace the model in eval mode; `auto` traces what cannot be scripted."""
    method, freeze = options["method"], is_true(options, "freeze")
    parts = [name for name in options["traced"].split(",") if name]
    if method not in _METHODS:
        raise ConfigError(f"method={method}: there is no such{closest(method, _METHODS)}")
    if parts and method == "trace":
        raise ConfigError("traced=… names parts of a model that is scripted: method=script")
    with quiet():
        made, names = _made(subject, method, parts)
        if freeze:
            made = torch.jit.freeze(made)
        with open(path, "wb") as file:  # by its name, torch would put that name into the file
            torch.jit.save(made, file, _extra_files={INTERFACE: names.to_text()})


def open_runner(path: Path, device: str = "cpu") -> Runner:
    """Load the file."""
    extra = {INTERFACE: ""}
    with quiet():
        try:
            model = torch.jit.load(path, map_location=device, _extra_files=extra)
        except RuntimeError as error:
            raise ExportError(f"{path} cannot be loaded: {reason(error)}") from None
    return TorchRunner(model, Interface.from_text(extra[INTERFACE]), device)


def _made(subject: Subject, method: str, parts: list[str]) -> tuple[Any, Interface]:
    why_not = ""
    if method != "trace":
        try:
            return _scripted(subject, parts)
        except ExportError as error:
            if method == "script" or parts:
                raise
            why_not = f"\nIt cannot be scripted either:\n{error}"
    found = traceable(subject, _COUNT)
    return _traced(found, why_not), found.interface


def _scripted(subject: Subject, parts: list[str]) -> tuple[Any, Interface]:
    model, call = subject.model(), subject.call(_COUNT)
    if parts:
        model = _with_traced_parts(subject, parts)
    try:
        made = torch.jit.script(model)
    except Exception as error:  # of any kind that the compiler raises
        raise ExportError(
            f"{type(model).__name__} cannot be scripted: {reason(error)}\nA part that cannot be "
            "scripted may be traced (traced=its.name), or all of it (method=trace); "
            "format=torch_export does not need this"
        ) from None
    return made, interface(subject, call, by_name=bool(call.keywords))


def _with_traced_parts(subject: Subject, parts: list[str]) -> nn.Module:
    """Return a copy of the model in which these submodules are traced, as one call uses them."""
    model, call = copy.deepcopy(subject.model()), subject.call(_COUNT)
    for name in parts:
        try:
            part = model.get_submodule(name)
        except AttributeError:
            known = [each for each, _ in model.named_modules() if each]
            raise ConfigError(
                f"traced={name}: the model has no such part{closest(name, known)}"
            ) from None
        calls: list[tuple[Any, ...]] = []
        handle = part.register_forward_pre_hook(lambda _, given, calls=calls: calls.append(given))
        with torch.no_grad():
            model(*call.arguments, **call.keywords)
        handle.remove()
        if not calls:
            raise ConfigError(f"traced={name}: the model does not call it for these inputs")
        given = call_of(part, calls[0], {})
        shape = Interface(list(given.names), [], [])
        made = _traced(Traceable(part, tuple(given.tensors().values()), shape), "")
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made)
    return model


def _traced(found: Traceable, why_not: str) -> Any:
    fixed = decisions(found)
    try:
        with quiet() as warned, torch.no_grad():
            made = torch.jit.trace(found.module, found.tensors, check_trace=False)
    except Exception as error:  # of any kind that the model raises when it is traced
        raise ExportError(f"the model cannot be traced: {reason(error)}{why_not}") from None
    lines = {(each.filename, each.lineno) for each in warned} & set(fixed)
    if lines:
        shown = "".join(f"\n  {name}, line {at}: {fixed[name, at]}" for name, at in sorted(lines))
        raise ExportError(
            "a trace would fix what values of tensors decide here, so it would be wrong for other "
            f"inputs:{shown}\nmethod=script keeps such branches; torch.where or torch.cond in "
            f"place of the branch suits every format; format=full_model needs neither{why_not}"
        )
    return made
