"""How the weights of a place fit a model: a table for people."""

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainer.core.formatting import pluralize
from trainer.importing.names import Match

_SHOWN = 8
_NEAR = 0.6
"""How alike names are that are called near, as difflib measures it."""
_INDENT = 13
_WIDEST = 60


@dataclass(frozen=True)
class Fit:
    """What of a source goes into a model, and what does not."""

    url: str
    """Where the source is."""
    kind: str
    """What it is, in words."""
    match: Match
    """Which names belong together."""
    misfits: Mapping[str, str]
    """Names of the model, each with what is different about its tensor."""
    elements: Mapping[str, int]
    """How many numbers each tensor of the model has, by name."""

    @property
    def loaded(self) -> list[str]:
        """Names of the model's tensors that are filled."""
        chosen, misfits = self.match.chosen, self.misfits
        return [name for name in self.elements if name in chosen and name not in misfits]

    @property
    def is_exact(self) -> bool:
        """Whether nothing is left over but what is left out on purpose."""
        return not (self.match.missing or self.match.unexpected or self.misfits)

    def lines(self) -> list[str]:
        """Return the table; a row that would count nothing is left out."""
        match = self.match
        under = f', names under "{match.prefix}"' if match.prefix else ""
        in_all, loaded = len(self.elements), self.loaded
        of = "" if len(loaded) == in_all else f" of {in_all:,}"
        numbers = sum(self.elements[name] for name in loaded)
        return [
            f"init.weights={self.url}, {self.kind}{under}:",
            f"  {'loaded':<{_INDENT}}{len(loaded):,}{of} tensors, {numbers:,} numbers",
            *_row("skipped", match.skipped, ", as init.skip says"),
            *_row("missing", match.missing, ", not there", _near(match.unexpected, match.there)),
            *_row(
                "unexpected",
                match.unexpected,
                ", not in the model",
                _near(match.missing, self.elements),
            ),
            *_row("misfit", list(self.misfits), "", self.misfits.__getitem__),
        ]


def _near(left: Sequence[str], names: Collection[str]) -> Callable[[str], str]:
    def tell(name: str) -> str:
        for others in (left, names):  # what has no counterpart either comes first
            found = difflib.get_close_matches(name, others, n=1, cutoff=_NEAR)
            if found:
                return f"nearest: {found[0]}"
        return ""

    return tell


def _row(
    what: str, names: Sequence[str], why: str, tell: Callable[[str], str] = lambda name: ""
) -> Iterator[str]:
    if not names:
        return
    yield f"  {what:<{_INDENT}}{pluralize(len(names), 'tensor')}{why}"
    shown = names[:_SHOWN]
    width = min(max(len(name) for name in shown), _WIDEST)
    for name in shown:
        yield f"  {'':<{_INDENT}}  {name:<{width}}  {tell(name)}".rstrip()
    if len(names) > len(shown):
        yield f"  {'':<{_INDENT}}  and {len(names) - len(shown):,} more"
