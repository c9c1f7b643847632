"""Match tensor names in a file to the model's, ignoring wrapper prefixes, and show the result."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations

from trainer.core.formatting import listing, pluralize
from trainer.errors import CheckpointError, ConfigError, closest

_WRAPPERS = (
    "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module",
)  # fmt: skip
"""Name parts added by torch.compile, FSDP (current, before torch 2.0) and checkpoint_wrapper."""
_MODULE = "module"
"""Name part added by DDP and DataParallel; also a valid name of a user's submodule."""
_PREFIXES = ("", "model.", "state_dict.", "model_state_dict.", "module.")
"""Common prefixes of a model's weights, most likely first."""
_MAX_COMBINATIONS = 4
"""Maximum `module` parts in one name that are removed one by one; above, all or none."""
_MAX_NAMES = 4
"""Names in an error message."""
_MAX_ROWS = 8
"""Names in each section of the table."""
_SIMILARITY = 0.6
"""Minimum difflib similarity of a suggested name."""
_INDENT = 13
_MAX_WIDTH = 60


@dataclass(frozen=True)
class Match:
    """Assignment of a file's tensors to the model's."""

    prefix: str
    """Prefix of every assigned name in the file, without wrappers."""
    sources: Mapping[str, str]
    """Names in the file, by name in the model."""
    skipped: Sequence[str]
    """Names in the model that init.skip excludes."""
    missing: Sequence[str]
    """Names in the model that are not in the file."""
    unexpected: Sequence[str]
    """Names in the file, below the prefix, that are not in the model."""
    names: Collection[str]
    """All names in the file below the prefix."""
    alternatives: Sequence[str] = ()
    """Other uncommon prefixes that match as many tensors."""


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """Return {name: name without wrapper prefixes}.

    `_orig_mod.` and the like are removed at any position, a leading `module.` only if every name
    has it.

    Raises:
        CheckpointError: two names become equal.
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
        raise CheckpointError(f"two tensors have the name {double!r} without wrapper prefixes")
    return dict(zip(original, cleaned, strict=True))


def _without_wrappers(name: str) -> str:
    return re.sub(rf"(?:^|(?<=\.))(?:{'|'.join(_WRAPPERS)})\.", "", name)


# --- matching ----------------------------------------------------------------------------------


def find_weights(
    names: Iterable[str],
    model_names: Iterable[str],
    *,
    tied: Mapping[str, str] | None = None,
    optional: Collection[str] = (),
    skip: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
) -> Match:
    """Match names below the prefix that has most of the model.

    Names are compared unchanged at first. If that does not match the complete model, names are
    compared without `module.` at any position (DDP around submodules), and then as one state dict
    for each part of the model (`encoder_state_dict.…`).

    Args:
        names: names in the file, with or without wrappers.
        model_names: names in the model.
        tied: names in the model, each with the name of the tensor that it shares; one is enough.
        optional: names in the model that may be missing.
        skip: shell patterns of names in the model to exclude.
        rename: new names by pattern, for names in the file below any prefix; the first matching
            pattern is used, and an empty new name excludes the tensor.

    Raises:
        ConfigError: two names become equal, or a pattern matches nothing.
    """
    groups = {name: (tied or {}).get(name, name) for name in model_names}
    try:
        targets = {clean: name for name, clean in clean_names(groups).items()}
        stored = clean_names(names)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    rules = _Rules(rename or {}, stored.values())
    stored = {name: clean for name, clean in stored.items() if not rules.excludes(clean)}
    skipped = _skipped(skip, targets, groups)
    needed = {groups[n] for n in groups if n not in optional} - {groups[n] for n in skipped}

    def exact(name: str) -> str | None:
        return targets.get(rules(name))

    def without_module(name: str) -> str | None:
        return next((targets[rules(n)] for n in _shortened(name) if rules(n) in targets), None)

    options = ((stored, exact), (stored, without_module), (_merged_parts(stored, targets), exact))
    best: _Option | None = None
    for cleaned, target in options:
        option = _option(cleaned, target, groups, needed)
        if best is None or option.count > best.count:
            best = option
        if best.count == len(needed):
            break
    assert best is not None  # noqa: S101 (for the type checker)
    assigned = _unique(best.assigned)
    sources = {name: assigned[name] for name in groups if name in assigned and name not in skipped}
    filled = {groups[name] for name in sources}
    missing = [
        n for n, group in groups.items()
        if group not in filled and n not in optional and n not in skipped
    ]  # fmt: skip
    prefix = best.prefix
    below = {n: clean[len(prefix) :] for n, clean in best.names.items() if clean.startswith(prefix)}
    used = set(assigned.values())
    unexpected = [clean for name, clean in below.items() if name not in used]
    names_below = set(below.values())
    return Match(prefix, sources, skipped, missing, unexpected, names_below, best.alternatives)


@dataclass(frozen=True)
class _Option:
    """Result of one way to compare names."""

    names: Mapping[str, str]
    """Names in the file with the compared names."""
    prefix: str
    alternatives: Sequence[str]
    assigned: Mapping[str, Sequence[str]]
    """Names in the file by name in the model; more than one is an error."""
    count: int
    """Number of needed tensors that are assigned."""


def _option(
    names: Mapping[str, str],
    target: Callable[[str], str | None],
    groups: Mapping[str, str],
    needed: Collection[str],
) -> _Option:
    """Return the assignment below the prefix that has most of the needed tensors."""
    assigned: dict[str, dict[str, list[str]]] = {prefix: {} for prefix in _PREFIXES}
    for name, clean in names.items():
        for tail in _tails(clean):
            if (model_name := target(tail)) is not None:
                prefix = clean[: len(clean) - len(tail)]
                assigned.setdefault(prefix, {}).setdefault(model_name, []).append(name)
    counts = {
        prefix: len({groups[name] for name in matched} & set(needed))
        for prefix, matched in assigned.items()
    }
    count = max(counts.values())
    best = [prefix for prefix in assigned if counts[prefix] == count]
    common = [prefix for prefix in _PREFIXES if prefix in best]
    if not common and len(best) > 1 and count == len(needed):
        raise ConfigError(
            f"the file has the complete model more than once, under {_listed(sorted(best))}; "
            f"exclude one: init.rename={{{sorted(best)[1]}*:''}}"
        )
    prefix = (common or best)[0]
    alternatives = [] if common else [other for other in best if other != prefix]
    return _Option(names, prefix, alternatives, assigned[prefix], count)


def _shortened(name: str) -> Iterator[str]:
    """Yield the name without some of its `module` parts, fewest removed first."""
    parts = name.split(".")
    positions = [at for at, part in enumerate(parts) if part == _MODULE]
    total = len(positions)
    counts = range(total + 1) if total <= _MAX_COMBINATIONS else (0, total)
    for count in counts:
        for removed in combinations(positions, count):
            yield ".".join(part for at, part in enumerate(parts) if at not in removed)


def _merged_parts(stored: Mapping[str, str], targets: Iterable[str]) -> dict[str, str]:
    """Return names like `encoder_state_dict.x` as the model's `encoder.x`; others are omitted."""
    tops = {name.partition(".")[0] for name in targets if "." in name}
    merged = {}
    for name, clean in stored.items():
        part = re.fullmatch(r"(\w+)_state_dict\.(.+)", clean)
        if part and (part[1] in tops or part[1] == "model"):
            merged[name] = f"{part[1]}.{part[2]}" if part[1] in tops else part[2]
    return merged


def _unique(assigned: Mapping[str, Sequence[str]]) -> dict[str, str]:
    for name, sources in assigned.items():
        if len(sources) > 1:
            raise ConfigError(f'{_listed(sources)} all match "{name}" of the model')
    return {name: sources[0] for name, sources in assigned.items()}


def _listed(names: Sequence[str]) -> str:
    return listing([f'"{name}"' for name in names], _MAX_NAMES)


def _tails(name: str) -> list[str]:
    return [name[start:] for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))]


# --- init.skip and init.rename -----------------------------------------------------------------


def _skipped(
    patterns: Sequence[str], targets: Mapping[str, str], groups: Mapping[str, str]
) -> list[str]:
    skipped = set()
    for pattern in patterns:
        matched = {name for clean, name in targets.items() if fnmatchcase(clean, pattern)}
        if not matched:
            raise ConfigError(
                f"init.skip: no tensor matches {pattern!r}{closest(pattern, targets)}"
            )
        skipped |= matched
    for name, group in groups.items():
        half = next((n for n in skipped if groups[n] == group), None)
        if half is not None and name not in skipped:
            raise ConfigError(f'init.skip: "{half}" and "{name}" are one tensor; skip both of them')
    if skipped and len(skipped) == len(groups):
        raise ConfigError(f"init.skip={list(patterns)} leaves nothing to load")
    return [name for name in groups if name in skipped]


class _Rules:
    """Renaming rules.

    Args:
        rename: new names by pattern.
        names: names in the file; each pattern must match one of them, below any prefix.
    """

    def __init__(self, rename: Mapping[str, str], names: Collection[str]) -> None:
        self._rules = [
            (re.compile("(.*)".join(map(re.escape, old.split("*")))), new.split("*"))
            for old, new in rename.items()
        ]
        tails = {tail for name in names for tail in _tails(name)} if rename else set()
        for (pattern, _), old in zip(self._rules, rename, strict=True):
            if not any(pattern.fullmatch(tail) for tail in tails):
                near = difflib.get_close_matches(old, tails, n=1)
                hint = f" (did you mean '{near[0]}'?)" if near else ""
                raise ConfigError(f"init.rename: no tensor matches {old!r}{hint}")

    def __call__(self, name: str) -> str:
        for pattern, new in self._rules:
            matched = pattern.fullmatch(name)
            if matched:
                wildcards = [*matched.groups()[: len(new) - 1], ""]
                return "".join(text + part for text, part in zip(new, wildcards, strict=True))
        return name

    def excludes(self, name: str) -> bool:
        """Return whether the new name is empty, below any prefix."""
        return bool(self._rules) and any(not self(tail) for tail in _tails(name))


# --- table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """Match of a file and a model, with the tensors that differ in shape or dtype."""

    url: str
    kind: str
    """Description of the format."""
    match: Match
    misfits: Mapping[str, str]
    """Names in the model, each with the difference of its tensor."""
    elements: Mapping[str, int]
    """Number of elements of each tensor in the model."""

    @property
    def loaded(self) -> list[str]:
        """Names in the model of the tensors to load."""
        sources, misfits = self.match.sources, self.misfits
        return [name for name in self.elements if name in sources and name not in misfits]

    @property
    def is_exact(self) -> bool:
        """True if all tensors match, except for excluded ones."""
        return not (self.match.missing or self.match.unexpected or self.misfits)

    def lines(self) -> list[str]:
        """Return the table; empty sections are omitted."""
        match = self.match
        prefix = f', prefix "{match.prefix}"' if match.prefix else ""
        total, loaded = len(self.elements), self.loaded
        of = "" if len(loaded) == total else f" of {total:,}"
        count = sum(self.elements[name] for name in loaded)
        nearest_in_file = _nearest(match.unexpected, match.names)
        nearest_in_model = _nearest(match.missing, self.elements)
        return [
            f"init.weights={self.url}, {self.kind}{prefix}:",
            f"  {'loaded':<{_INDENT}}{len(loaded):,}{of} tensors, {count:,} elements",
            *_section("skipped", match.skipped, " (init.skip)"),
            *_section("missing", match.missing, " not in the file", nearest_in_file),
            *_section("unexpected", match.unexpected, " not in the model", nearest_in_model),
            *_section("misfit", list(self.misfits), "", self.misfits.__getitem__),
        ]


def _nearest(unmatched: Sequence[str], names: Collection[str]) -> Callable[[str], str]:
    def note(name: str) -> str:
        for candidates in (unmatched, names):  # names without a counterpart first
            near = difflib.get_close_matches(name, candidates, n=1, cutoff=_SIMILARITY)
            if near:
                return f"nearest: {near[0]}"
        return ""

    return note


def _section(
    title: str,
    names: Sequence[str],
    remark: str,
    note: Callable[[str], str] = lambda name: "",
) -> Iterator[str]:
    if not names:
        return
    yield f"  {title:<{_INDENT}}{pluralize(len(names), 'tensor')}{remark}"
    listed = names[:_MAX_ROWS]
    width = min(max(len(name) for name in listed), _MAX_WIDTH)
    for name in listed:
        yield f"  {'':<{_INDENT}}  {name:<{width}}  {note(name)}".rstrip()
    if len(names) > len(listed):
        yield f"  {'':<{_INDENT}}  and {len(names) - len(listed):,} more"
