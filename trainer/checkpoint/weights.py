"""Weights from anywhere into a model: whoever wrote them, and whatever they are wrapped in."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from trainer.checkpoint import lineage, places, plan, tree
from trainer.checkpoint.foreign import Source, open_foreign
from trainer.checkpoint.lineage import FOLDER, MANIFEST
from trainer.checkpoint.manifest import Manifest, from_bytes
from trainer.checkpoint.plan import TORCH_DTYPES
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.tiers import Tiers
from trainer.config import ObjectStore
from trainer.errors import CheckpointError, ConfigError
from trainer.storage import Store, open_store

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PREFIXES = ("", "model.", "state_dict.", "model_state_dict.", "module.")
"""Where a model's weights usually stand, the likeliest first."""
_EXTRA = "_extra_state"
"""What nn.Module calls the value of `get_extra_state`."""
_SHOWN = 4


def load(
    model: nn.Module,
    url: str,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
) -> tuple[str, ...]:
    """Fill a model, one tensor at a time. Any rank, no collectives.

    Args:
        model: the plain module.
        url: of a safetensors file or folder, a torch.save file, a DCP folder, a run of ours or one
            of its checkpoints.
        settings: of object stores.

    Returns:
        Why newer checkpoints of the run were passed over, if any were.

    Raises:
        ConfigError: nothing of these is there, or a name, shape or dtype does not fit.
        CheckpointError: it is damaged, or holds what is never read.
        StoreError: it could not be read.
    """
    source, skipped = open_weights(url, settings)
    try:
        _fill(model, source)
    except ConfigError as error:
        raise ConfigError(f"init.weights={url} does not fit this model: {error}") from None
    return skipped


# --- where they are ----------------------------------------------------------------------------


def open_weights(
    url: str,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
) -> tuple[Source, tuple[str, ...]]:
    """Open what weights can be read from; of a run, its newest whole checkpoint.

    Returns:
        It, and why newer checkpoints were passed over.

    Raises:
        ConfigError: there is nothing of that kind.
        CheckpointError: it is damaged, or holds what is never read.
        StoreError: it could not be read.
    """
    place = url.removesuffix(f"/{MANIFEST}").rstrip("/") or "/"
    store = open_store(place, settings)
    names = store.entries("")
    if MANIFEST in names:
        parent, folder = places.split(place, settings)
        key = f"{folder}/{MANIFEST}"
        manifest = from_bytes(parent.read(key), f"{parent.url}/{key}")
        return _Ours(url, Reader(parent, folder, manifest), manifest), ()
    if f"{FOLDER}/" in names:
        survey = Tiers(store).survey()
        if survey.with_damaged:
            return _newest_whole(url, store, survey.commits)
    found = open_foreign(place, settings)
    if found is None:
        raise ConfigError(
            f"init.weights={url} does not fit any model: there is no safetensors file or folder, "
            "torch.save file, DCP folder, run or checkpoint; check the path"
        )
    return found, ()


def _newest_whole(
    url: str, store: Store, commits: Sequence[lineage.Commit]
) -> tuple[Source, tuple[str, ...]]:
    skipped: list[str] = []
    for commit in reversed(commits):
        try:
            manifest = lineage.read_manifest(store, commit)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        found = _Ours(f"{url}/{commit.folder}", Reader(store, commit.folder, manifest), manifest)
        return found, tuple(skipped)
    raise CheckpointError(f"{url} has checkpoints and none of them is whole. {' '.join(skipped)}")


class _Ours:
    """A checkpoint of this program as a Source; every byte of it is checked."""

    kind = "a checkpoint of Perdure"

    def __init__(self, url: str, reader: Reader, manifest: Manifest) -> None:
        self.url = url
        self.fetch = reader.fetch
        entries = manifest.tensors
        self.tensors = {
            name: (TORCH_DTYPES[entry.dtype], entry.shape)
            for name, entry in entries.items()
            if entry.alias is None
        }
        self.aliases = {name: e.alias for name, e in entries.items() if e.alias is not None}
        extra = manifest.objects.get("model_extra", {})
        self.objects = {f"model.{name}": tree.join(v, reader.fetch) for name, v in extra.items()}
        self.paths = {name: (name,) for name in (*entries, *self.objects)}


# --- which of them are the model's -------------------------------------------------------------


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """Return {name: name without the prefixes of wrappers}.

    A leading `module.` is a wrapper's if every name has it; `_orig_mod.` and the others, which no
    user writes, are removed wherever they stand.

    Raises:
        CheckpointError: two names would become one.
    """
    original = list(names)
    cleaned = original
    while True:
        shorter = [_without_wrappers(name) for name in cleaned]
        if shorter and all(name.startswith("module.") for name in shorter):
            shorter = [name.removeprefix("module.") for name in shorter]
        if shorter == cleaned:
            break
        cleaned = shorter
    if len(set(cleaned)) != len(cleaned):
        double = next(name for name in cleaned if cleaned.count(name) > 1)
        raise CheckpointError(f"two tensors would both be called {double!r} without prefixes")
    return dict(zip(original, cleaned, strict=True))


def _without_wrappers(name: str) -> str:
    pattern = "|".join(re.escape(wrapper) for wrapper in _WRAPPERS[1:])
    return re.sub(rf"(?:^|(?<=\.))(?:{pattern})\.", "", name)


def find_weights(
    names: Iterable[str],
    model_names: Iterable[str],
    *,
    tied: Mapping[str, str] | None = None,
    optional: Collection[str] = (),
) -> dict[str, str]:
    """Return {name in the model: name in the source}, whatever prefix the source's names have.

    Args:
        names: all that the source has; wrappers in them do not count.
        model_names: all that the model has.
        tied: names of the model with the name of the tensor that they share; one of them is enough.
        optional: names of the model that may be missing.

    Raises:
        ConfigError: a name is missing under every prefix, or too many stand there, or two unusual
            prefixes would do.
    """
    groups = {name: (tied or {}).get(name, name) for name in model_names}
    try:
        ours = {clean: name for name, clean in clean_names(groups).items()}
        theirs = clean_names(names)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    found: dict[str, dict[str, str]] = {prefix: {} for prefix in _PREFIXES}
    for name, clean in theirs.items():
        for start in [0, *(dot.end() for dot in re.finditer(r"\.", clean))]:
            if clean[start:] in ours:
                found.setdefault(clean[:start], {})[ours[clean[start:]]] = name
    prefix = _prefix(found, groups, {groups[name] for name in groups if name not in optional})
    chosen = found[prefix]
    there = {groups[name] for name in chosen}
    missing = [n for n, group in groups.items() if group not in there and n not in optional]
    taken = set(chosen.values())
    extra = [n for n, clean in theirs.items() if clean.startswith(prefix) and n not in taken]
    if missing or extra:
        lacks = f"it lacks {_listed(missing)}" if missing else ""
        holds = f"it holds {_listed(extra)} besides" if extra else ""
        raise ConfigError(", and ".join(text for text in (lacks, holds) if text))
    return {name: chosen[name] for name in groups if name in chosen}


def _prefix(
    found: Mapping[str, Mapping[str, str]], groups: Mapping[str, str], needed: set[str]
) -> str:
    """Return the prefix under which all stands that is needed, or else the most of it."""
    counts = {prefix: len({groups[n] for n in names} & needed) for prefix, names in found.items()}
    fitting = [prefix for prefix, count in counts.items() if count == len(needed)]
    usual = [prefix for prefix in _PREFIXES if prefix in fitting]
    if not usual and len(fitting) > 1:
        raise ConfigError(
            f"it holds the whole model more than once, under {_listed(sorted(fitting))}; leave one "
            "of them in it"
        )
    return max(usual[:1] or fitting or counts, key=lambda prefix: counts[prefix])


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    text = ", ".join(f'"{name}"' for name in names[:_SHOWN])
    return f"{text} and {more:,} more" if more > 0 else text


# --- into the model ----------------------------------------------------------------------------


def _fill(model: nn.Module, source: Source) -> None:
    live = model.state_dict(keep_vars=True)
    extras = {name for name in live if name.rpartition(".")[2] == _EXTRA}
    tensors = {n: v for n, v in live.items() if isinstance(v, Tensor) and n not in extras}
    first: dict[int, str] = {}
    tied = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    names = [*source.tensors, *source.aliases, *(_extra_names(source) if extras else ())]
    optional = {name for name in extras if not isinstance(live[name], Tensor)}
    chosen = find_weights(names, [*tensors, *extras], tied=tied, optional=optional)
    problems = [
        text
        for name, tensor in tensors.items()
        if name in chosen and (text := _problem(name, tensor, source, chosen[name]))
    ]
    if problems:
        more = len(problems) - _SHOWN
        raise ConfigError("; ".join(problems[:_SHOWN]) + (f"; {more:,} more" if more > 0 else ""))
    for name, stored in chosen.items():
        value = source.objects[stored] if _is_object(source, stored) else source.fetch(stored)
        if name in extras:
            model.get_submodule(name.rpartition(".")[0]).set_extra_state(value)
        else:
            with torch.no_grad():
                _put(value, tensors[name])


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


def _problem(name: str, tensor: Tensor, source: Source, stored: str) -> str:
    dtype, shape = source.tensors[source.aliases.get(stored, stored)]
    if tuple(tensor.shape) != shape:
        return f"size mismatch for {name}: {list(shape)} there, {list(tensor.shape)} in the model"
    if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.is_floating_point()):
        return (
            f"{name} is {dtype} there, {tensor.dtype} in the model, and only floating-point "
            "numbers are converted"
        )
    return ""
