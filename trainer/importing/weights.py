"""Load weights of any supported format into a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.checkpoint import plan, select, state_tree
from trainer.checkpoint.plan import TORCH_DTYPES
from trainer.checkpoint.select import Selection
from trainer.config.schema import Init, ObjectStore
from trainer.errors import ConfigError
from trainer.importing.formats import Source, open_external
from trainer.importing.name_matching import Fit, find_weights
from trainer.importing.pickles import UnsafePickleError
from trainer.storage import open_store

_EXTRA = "_extra_state"
"""Last name part of nn.Module's extra state."""


@dataclass(frozen=True)
class Loaded:
    """Report of `load`."""

    lines: Sequence[str]
    """Table of matched and unmatched tensors."""
    skipped: Sequence[str]
    """Errors of newer checkpoints of the same run that are damaged."""


def load(
    model: nn.Module,
    init: Init,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
    *,
    warn: Callable[[str], None] = print,
) -> Loaded:
    """Load weights into a model, one tensor at a time. Any rank, no collectives.

    Args:
        model: the plain module.
        init: `weights` is a safetensors file or folder, a torch.save file, a DCP or OneFlow
            folder, a Perdure run or one of its checkpoints; the other settings rename, exclude and
            require tensors.
        settings: object store settings.
        warn: called before a pickle is executed, if init.allow_pickle is set.

    Raises:
        ConfigError: no weights there, or they do not match the model; the model is unchanged.
        CheckpointError: the file is damaged, or has content that is never read.
        StoreError: the store failed.
    """
    url = init.weights or ""
    source, skipped = open_weights(url, settings, on_pickle=warn if init.allow_pickle else None)
    try:
        fit = _fill(model, source, init)
    except ConfigError as error:
        raise ConfigError(f"init.weights={url} does not fit this model: {error}") from None
    return Loaded(fit.lines(), skipped)


# --- source ------------------------------------------------------------------------------------


def open_weights(
    url: str,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
    *,
    on_pickle: Callable[[str], None] | None = None,
) -> tuple[Source, tuple[str, ...]]:
    """Open a file or folder with weights; for a run, its newest intact checkpoint.

    Args:
        url: the path.
        settings: object store settings.
        on_pickle: called with a warning before a pickle is executed; default: never execute one.

    Returns:
        The source, and errors of newer checkpoints that are damaged.

    Raises:
        ConfigError: no supported format at that path.
        CheckpointError: the file is damaged, or has content that is never read.
        StoreError: the store failed.
    """
    selection = select.from_path(url, settings)
    if selection is not None:
        return _PerdureSource(selection), selection.skipped
    try:
        source = open_external(url, settings, on_pickle=on_pickle)
    except UnsafePickleError as error:
        if open_store(url, settings).entries(""):  # pickles in folders are never executed
            raise
        raise UnsafePickleError(
            f"{error}. If you trust the file, init.allow_pickle=true executes it"
        ) from None
    if source is None:
        raise ConfigError(
            f"init.weights={url}: no safetensors file or folder, torch.save file, DCP folder, "
            "OneFlow folder, run or checkpoint there; check the path"
        )
    return source, ()


class _PerdureSource:
    """A Perdure checkpoint as a Source; every byte is verified."""

    kind = "a Perdure checkpoint"

    def __init__(self, selection: Selection) -> None:
        self.url = f"{selection.urls[0]}/{selection.commit.folder}"
        self.fetch = selection.reader().fetch
        entries = selection.manifest.tensors
        self.tensors = {
            name: (TORCH_DTYPES[entry.dtype], entry.shape)
            for name, entry in entries.items()
            if entry.alias is None
        }
        self.aliases = {name: e.alias for name, e in entries.items() if e.alias is not None}
        extra = selection.manifest.objects.get("model_extra", {})
        self.objects = {
            f"model.{name}": state_tree.join(v, self.fetch) for name, v in extra.items()
        }
        self.paths = {name: (name,) for name in (*entries, *self.objects)}


# --- model -------------------------------------------------------------------------------------


def _fill(model: nn.Module, source: Source, init: Init) -> Fit:
    """Load matching tensors; reject a match that `init` does not allow before any change."""
    live = model.state_dict(keep_vars=True)
    extras = {name for name in live if name.rpartition(".")[2] == _EXTRA}
    tensors = {n: v for n, v in live.items() if isinstance(v, Tensor) and n not in extras}
    first: dict[int, str] = {}
    names = [*source.tensors, *source.aliases, *(_extra_names(source) if extras else ())]
    match = find_weights(
        names,
        [*tensors, *extras],
        tied={name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()},
        optional={name for name in extras if not isinstance(live[name], Tensor)},
        skip=init.skip,
        rename=init.rename,
    )
    misfits = {
        name: text
        for name, tensor in tensors.items()
        if name in match.sources and (text := _problem(tensor, source, match.sources[name]))
    }
    elements = {name: tensor.numel() for name, tensor in tensors.items()}
    fit = Fit(source.url, source.kind, match, misfits, elements)
    _check(fit, init)
    for name, stored in match.sources.items():
        if name in misfits:
            continue
        value = source.objects[stored] if _is_object(source, stored) else source.fetch(stored)
        if name in extras:
            model.get_submodule(name.rpartition(".")[0]).set_extra_state(value)
        else:
            with torch.no_grad():
                _put(value, tensors[name])
    return fit


def _check(fit: Fit, init: Init) -> None:
    """Raise ConfigError if `init` does not allow this match."""
    table = "\n".join(fit.lines())
    if not init.strict and fit.match.alternatives and not fit.is_exact:
        others = ", ".join(f'"{prefix}"' for prefix in fit.match.alternatives)
        raise ConfigError(
            f'prefix {others} matches as many tensors as "{fit.match.prefix}"; exclude one: '
            f"init.rename={{{fit.match.alternatives[0]}*:''}}\n{table}"
        )
    if not fit.loaded:
        raise ConfigError(f"no tensor in the file matches\n{table}")
    if init.strict and not fit.is_exact:
        raise ConfigError(
            f"every tensor must be in both, with equal shapes\n{table}\n"
            "Keep the initial values of layers with init.skip=[fc.*], rename tensors of the file "
            "with init.rename={old.*:new.*} (or '' to exclude them), or load only the tensors that "
            "match with init.strict=false"
        )


def _put(value: Tensor, target: Tensor) -> None:
    """Copy a full tensor into a model's tensor; for a DTensor, the part of this rank."""
    if hasattr(target, "device_mesh"):
        box = plan.describe({"": target})[0].box
        for axis, (offset, length) in enumerate(zip(box.offsets, box.lengths, strict=True)):
            value = value.narrow(axis, offset, length)
    plan.local(target).copy_(value)


def _is_object(source: Source, name: str) -> bool:
    return name not in source.tensors and name not in source.aliases


def _extra_names(source: Source) -> list[str]:
    for name in source.objects:
        if f".{_EXTRA}." in f".{name}":
            raise ConfigError(
                f'"{name}" is part of a module\'s extra state, which cannot be assembled from a '
                "file; remove it from the file"
            )
    return [name for name in source.objects if name.rpartition(".")[2] == _EXTRA]


def _problem(tensor: Tensor, source: Source, stored: str) -> str:
    if _is_object(source, stored):
        return ""
    dtype, shape = source.tensors[source.aliases.get(stored, stored)]
    if tuple(tensor.shape) != shape:
        return f"shape {list(shape)} in the file, {list(tensor.shape)} in the model"
    if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.is_floating_point()):
        return (
            f"{dtype} in the file, {tensor.dtype} in the model; only floating-point dtypes are "
            "converted"
        )
    return ""
