"""Weights from anywhere into a model: whoever wrote them, and whatever they are wrapped in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.checkpoint import plan, select, state_tree
from trainer.checkpoint.plan import TORCH_DTYPES
from trainer.checkpoint.select import Selection
from trainer.config.schema import Init, ObjectStore
from trainer.errors import ConfigError
from trainer.importing.fit import Fit
from trainer.importing.formats import Source, open_external
from trainer.importing.names import find_weights
from trainer.importing.pickles import RefusedError
from trainer.storage import open_store

_EXTRA = "_extra_state"
"""What nn.Module calls the value of `get_extra_state`."""


@dataclass(frozen=True)
class Loaded:
    """What there is to say after a model was filled."""

    lines: Sequence[str]
    """The table of what fits and what does not."""
    passed_over: Sequence[str]
    """Why newer checkpoints of the run that it came from were passed over, if any were."""


def load(
    model: nn.Module,
    wanted: Init,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
    *,
    warn: Callable[[str], None] = print,
) -> Loaded:
    """Fill a model, one tensor at a time. Any rank, no collectives.

    Args:
        model: the plain module.
        wanted: where the weights are: a safetensors file or folder, a torch.save file, a DCP or
            OneFlow folder, a run of ours or one of its checkpoints; and how they have to fit.
        settings: of object stores.
        warn: called before a pickle is run, where that is allowed.

    Raises:
        ConfigError: nothing of these is there, or what is there does not fit; nothing is changed.
        CheckpointError: it is damaged, or holds what is not read.
        StoreError: it could not be read.
    """
    url = wanted.weights or ""
    source, passed_over = open_weights(
        url, settings, on_pickle=warn if wanted.allow_pickle else None
    )
    try:
        fit = _fill(model, source, wanted)
    except ConfigError as error:
        raise ConfigError(f"init.weights={url} does not fit this model: {error}") from None
    return Loaded(fit.lines(), passed_over)


# --- where they are ----------------------------------------------------------------------------


def open_weights(
    url: str,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
    *,
    on_pickle: Callable[[str], None] | None = None,
) -> tuple[Source, tuple[str, ...]]:
    """Open what weights can be read from; of a run, its newest whole checkpoint.

    Args:
        url: of it.
        settings: of object stores.
        on_pickle: called with a warning before a pickle is run; without it none is.

    Returns:
        It, and why newer checkpoints were passed over.

    Raises:
        ConfigError: there is nothing of that kind.
        CheckpointError: it is damaged, or holds what is never read.
        StoreError: it could not be read.
    """
    selection = select.from_path(url, settings)
    if selection is not None:
        return _PerdureSource(selection), selection.skipped
    try:
        found = open_external(url, settings, on_pickle=on_pickle)
    except RefusedError as error:
        if open_store(url, settings).entries(""):  # no pickle in a folder is ever run
            raise
        raise RefusedError(
            f"{error}. Or, if you trust whoever made it, init.allow_pickle=true runs it"
        ) from None
    if found is None:
        raise ConfigError(
            f"init.weights={url} does not fit any model: there is no safetensors file or folder, "
            "torch.save file, DCP folder, OneFlow folder, run or checkpoint; check the path"
        )
    return found, ()


class _PerdureSource:
    """A Perdure checkpoint as a Source; every byte is verified."""

    kind = "a checkpoint of Perdure"

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


# --- into the model ----------------------------------------------------------------------------


def _fill(model: nn.Module, source: Source, wanted: Init) -> Fit:
    """Load what fits; refuse before anything is changed where that is not what is wanted."""
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
        skip=wanted.skip,
        rename=wanted.rename,
    )
    misfits = {
        name: text
        for name, tensor in tensors.items()
        if name in match.chosen and (text := _problem(tensor, source, match.chosen[name]))
    }
    elements = {name: tensor.numel() for name, tensor in tensors.items()}
    fit = Fit(source.url, source.kind, match, misfits, elements)
    _refuse(fit, wanted)
    for name, stored in match.chosen.items():
        if name in misfits:
            continue
        value = source.objects[stored] if _is_object(source, stored) else source.fetch(stored)
        if name in extras:
            model.get_submodule(name.rpartition(".")[0]).set_extra_state(value)
        else:
            with torch.no_grad():
                _put(value, tensors[name])
    return fit


def _refuse(fit: Fit, wanted: Init) -> None:
    table = "\n".join(fit.lines())
    if not wanted.strict and fit.match.others and not fit.is_exact:
        others = ", ".join(f'"{prefix}"' for prefix in fit.match.others)
        raise ConfigError(
            f'as much of it stands under {others} as under "{fit.match.prefix}"; leave one out: '
            f"init.rename={{{fit.match.others[0]}*:''}}\n{table}"
        )
    if not fit.loaded:
        raise ConfigError(f"nothing of it does\n{table}")
    if wanted.strict and not fit.is_exact:
        raise ConfigError(
            f"every tensor has to be in both, with one shape\n{table}\n"
            "Leave layers of the model as they are initialised with init.skip=[fc.*], give names "
            "there other names with init.rename={old.*:new.*} (or '' to leave them out), or take "
            "what fits with init.strict=false"
        )


def _put(value: Tensor, target: Tensor) -> None:
    """Copy a whole tensor into a live one, of a DTensor into what this rank holds of it."""
    if hasattr(target, "device_mesh"):
        box = plan.describe({"": target}, [0])[0].box
        for axis, (offset, length) in enumerate(zip(box.offsets, box.lengths, strict=True)):
            value = value.narrow(axis, offset, length)
    plan.local(target).copy_(value)


def _is_object(source: Source, name: str) -> bool:
    return name not in source.tensors and name not in source.aliases


def _extra_names(source: Source) -> list[str]:
    for name in source.objects:
        if f".{_EXTRA}." in f".{name}":
            raise ConfigError(
                f'"{name}" is a part of a module\'s extra state, which cannot be put together '
                "from a file; leave it out of it"
            )
    return [name for name in source.objects if name.rpartition(".")[2] == _EXTRA]


def _problem(tensor: Tensor, source: Source, stored: str) -> str:
    if _is_object(source, stored):
        return ""
    dtype, shape = source.tensors[source.aliases.get(stored, stored)]
    if tuple(tensor.shape) != shape:
        return f"shape {list(shape)} there, {list(tensor.shape)} in the model"
    if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.is_floating_point()):
        return (
            f"{dtype} there, {tensor.dtype} in the model; only floating-point numbers are converted"
        )
    return ""
