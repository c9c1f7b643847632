"""Which tensor of a file is which of the model, whatever wrapped either of them."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import combinations

from trainer.core.formatting import listing
from trainer.errors import CheckpointError, ConfigError, closest

_WRAPPERS = (
    "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module",
)  # fmt: skip
"""What torch.compile, FSDP (now and before torch 2.0) and checkpointing put into names."""
_MODULE = "module"
"""What DDP and DataParallel put into names; a user may call a submodule so too."""
_PREFIXES = ("", "model.", "state_dict.", "model_state_dict.", "module.")
"""Where a model's weights usually stand, the likeliest first."""
_MOST_REMOVED = 4
"""How many `module` in one name are tried one by one."""
_SHOWN = 4

_Found = dict[str, dict[str, list[str]]]
"""Names in the source by prefix and by name in the model."""


@dataclass(frozen=True)
class Match:
    """Which names belong together, and which to none."""

    prefix: str
    """What stands before every name in the source, without wrappers."""
    chosen: Mapping[str, str]
    """Names in the source by name in the model."""
    skipped: Sequence[str]
    """Names in the model that are left out on purpose."""
    missing: Sequence[str]
    """Names in the model that are not in the source."""
    unexpected: Sequence[str]
    """Names in the source, below the prefix, that are not in the model."""
    there: Collection[str]
    """All names in the source below the prefix."""
    others: Sequence[str] = ()
    """Other unusual prefixes under which as much of the model stands."""


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
        if shorter and all(name.startswith(f"{_MODULE}.") for name in shorter):
            shorter = [name.removeprefix(f"{_MODULE}.") for name in shorter]
        if shorter == cleaned:
            break
        cleaned = shorter
    if len(set(cleaned)) != len(cleaned):
        double = next(name for name in cleaned if cleaned.count(name) > 1)
        raise CheckpointError(f"two tensors would both be called {double!r} without prefixes")
    return dict(zip(original, cleaned, strict=True))


def _without_wrappers(name: str) -> str:
    return re.sub(rf"(?:^|(?<=\.))(?:{'|'.join(_WRAPPERS)})\.", "", name)


# --- which of them are the model's -------------------------------------------------------------


def find_weights(
    names: Iterable[str],
    model_names: Iterable[str],
    *,
    tied: Mapping[str, str] | None = None,
    optional: Collection[str] = (),
    skip: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
) -> Match:
    """Match names, whatever prefix the source's have.

    Where a prefix has the whole model, names are taken as they are; elsewhere a `module.` is
    removed wherever that makes a name one of the model's.

    Args:
        names: all that the source has; wrappers in them do not count.
        model_names: all that the model has.
        tied: names of the model with the name of the tensor that they share; one of them is enough.
        optional: names of the model that may be missing.
        skip: shell patterns of names of the model that are left out.
        rename: new names by pattern, for names of the source below any prefix; the first pattern
            that fits counts, and what gets an empty name is left out.

    Raises:
        ConfigError: two names would become one, or a pattern fits nothing.
    """
    groups = {name: (tied or {}).get(name, name) for name in model_names}
    try:
        ours = {clean: name for name, clean in clean_names(groups).items()}
        theirs = clean_names(names)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    rules = _Rules(rename or {}, theirs.values())
    theirs = {name: clean for name, clean in theirs.items() if not rules.leaves_out(clean)}
    skipped = _skipped(skip, ours, groups)
    needed = {groups[n] for n in groups if n not in optional} - {groups[n] for n in skipped}
    found = _found(theirs, lambda name: _known(rules(name), ours))
    prefix, others = _prefix(found, groups, needed)
    if not _is_whole(found[prefix], groups, needed):
        loose = _found(theirs, lambda name: _nearest_known(name, ours, rules))
        looser, more = _prefix(loose, groups, needed)
        if _count(loose[looser], groups, needed) > _count(found[prefix], groups, needed):
            found, prefix, others = loose, looser, more
    bundled = _bundled(theirs, ours)
    if not _is_whole(found[prefix], groups, needed) and bundled:
        parts = _found(bundled, lambda name: _known(rules(name), ours))
        if _is_whole(parts[""], groups, needed):
            found, prefix, others, theirs = parts, "", [], bundled
    taken = _each_once(found[prefix])
    chosen = {name: taken[name] for name in groups if name in taken and name not in skipped}
    there = {groups[name] for name in chosen}
    missing = [
        n for n, group in groups.items()
        if group not in there and n not in optional and n not in skipped
    ]  # fmt: skip
    below = {n: clean[len(prefix) :] for n, clean in theirs.items() if clean.startswith(prefix)}
    used = set(taken.values())
    unexpected = [clean for name, clean in below.items() if name not in used]
    return Match(prefix, chosen, skipped, missing, unexpected, set(below.values()), others)


def _known(name: str, ours: Mapping[str, str]) -> str | None:
    return ours.get(name)


def _nearest_known(name: str, ours: Mapping[str, str], rules: "_Rules") -> str | None:
    """Return the name of the model that a name becomes with the fewest `module.` removed."""
    return next((ours[rules(n)] for n in _shortened(name) if rules(n) in ours), None)


def _shortened(name: str) -> Iterator[str]:
    parts = name.split(".")
    places = [at for at, part in enumerate(parts) if part == _MODULE]
    counts = range(len(places) + 1) if len(places) <= _MOST_REMOVED else (0, len(places))
    for count in counts:
        for removed in combinations(places, count):
            yield ".".join(part for at, part in enumerate(parts) if at not in removed)


def _bundled(theirs: Mapping[str, str], ours: Iterable[str]) -> dict[str, str]:
    """Return names of a file that has a state dict for each part of the model, as in the model."""
    tops = {name.partition(".")[0] for name in ours if "." in name}
    bundled = {}
    for name, clean in theirs.items():
        part = re.fullmatch(r"(\w+)_state_dict\.(.+)", clean)
        if part and (part[1] in tops or part[1] == "model"):
            bundled[name] = f"{part[1]}.{part[2]}" if part[1] in tops else part[2]
    return bundled


def _found(theirs: Mapping[str, str], known: Callable[[str], str | None]) -> _Found:
    found: _Found = {prefix: {} for prefix in _PREFIXES}
    for name, clean in theirs.items():
        for start in [0, *(dot.end() for dot in re.finditer(r"\.", clean))]:
            target = known(clean[start:])
            if target is not None:
                found.setdefault(clean[:start], {}).setdefault(target, []).append(name)
    return found


def _each_once(found: Mapping[str, Sequence[str]]) -> dict[str, str]:
    for target, sources in found.items():
        if len(sources) > 1:
            raise ConfigError(f'{_listed(sources)} would both be "{target}" of the model')
    return {target: sources[0] for target, sources in found.items()}


def _prefix(
    found: _Found, groups: Mapping[str, str], needed: Collection[str]
) -> tuple[str, list[str]]:
    """Return the prefix under which most stands of what is needed, and others as good."""
    counts = {prefix: _count(names, groups, needed) for prefix, names in found.items()}
    best = [prefix for prefix in found if counts[prefix] == max(counts.values())]
    usual = [prefix for prefix in _PREFIXES if prefix in best]
    if not usual and len(best) > 1 and counts[best[0]] == len(needed):
        raise ConfigError(
            f"it holds the whole model more than once, under {_listed(sorted(best))}; leave one "
            f"of them in it, or leave one out: init.rename={{{sorted(best)[1]}*:''}}"
        )
    chosen = (usual or best)[0]
    return chosen, [] if usual else [prefix for prefix in best if prefix != chosen]


def _count(names: Iterable[str], groups: Mapping[str, str], needed: Collection[str]) -> int:
    return len({groups[name] for name in names} & set(needed))


def _is_whole(names: Iterable[str], groups: Mapping[str, str], needed: Collection[str]) -> bool:
    return _count(names, groups, needed) == len(needed)


def _listed(names: Sequence[str]) -> str:
    return listing([f'"{name}"' for name in names], _SHOWN)


# --- what the user says of them ----------------------------------------------------------------


def _skipped(
    patterns: Sequence[str], ours: Mapping[str, str], groups: Mapping[str, str]
) -> list[str]:
    matched = set()
    for pattern in patterns:
        fitting = {name for clean, name in ours.items() if fnmatchcase(clean, pattern)}
        if not fitting:
            raise ConfigError(f"init.skip: nothing is called {pattern!r}{closest(pattern, ours)}")
        matched |= fitting
    for name, group in groups.items():
        half = next((n for n in matched if groups[n] == group), None)
        if half is not None and name not in matched:
            raise ConfigError(f'init.skip: "{half}" and "{name}" are one tensor; skip both of them')
    if matched and len(matched) == len(groups):
        raise ConfigError(f"init.skip={list(patterns)} leaves nothing to load")
    return [name for name in groups if name in matched]


class _Rules:
    """Gives names new names.

    Args:
        rename: new names by pattern.
        names: those of the source, of which each pattern has to fit one, below some prefix.
    """

    def __init__(self, rename: Mapping[str, str], names: Collection[str]) -> None:
        self._rules = [
            (re.compile("(.*)".join(map(re.escape, old.split("*")))), new.split("*"))
            for old, new in rename.items()
        ]
        tails = {tail for name in names for tail in _tails(name)} if rename else set()
        for (pattern, _), old in zip(self._rules, rename, strict=True):
            if not any(pattern.fullmatch(tail) for tail in tails):
                near = get_close_matches(old, tails, n=1)
                hint = f" (did you mean '{near[0]}'?)" if near else ""
                raise ConfigError(f"init.rename: nothing there is called {old!r}{hint}")

    def __call__(self, name: str) -> str:
        for pattern, new in self._rules:
            matched = pattern.fullmatch(name)
            if matched:
                kept = [*matched.groups()[: len(new) - 1], ""]
                return "".join(text + part for text, part in zip(new, kept, strict=True))
        return name

    def leaves_out(self, name: str) -> bool:
        """Whether it gets an empty name, below some prefix."""
        return bool(self._rules) and any(not self(tail) for tail in _tails(name))


def _tails(name: str) -> list[str]:
    return [name[start:] for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))]
