"""`diff`: differences between two checkpoints."""

from dataclasses import asdict

from trainer.checkpoint import compare, select
from trainer.checkpoint.compare import Comparison
from trainer.checkpoint.shard import element_count
from trainer.checkpoints.answer import Answer, OneStep, open_checkpoints, tensor_bytes
from trainer.cli import Arguments
from trainer.core.formatting import pluralize, progress, short_repr, table
from trainer.errors import DONE, FAILURE, ConfigError


def diff(arguments: Arguments[OneStep], usage: str) -> Answer:
    """Return the differences between two paths, or two steps of one; exit code 1 for any."""
    steps = arguments.options.step.split(",")
    if (len(steps), len(arguments.places)) not in ((1, 2), (2, 1)):
        raise ConfigError(f"pass two paths, or one path and step=A,B\n{usage}")
    opened = [open_checkpoints(path, arguments.store) for path in arguments.places]
    pairs = [(location, select.pick(location, step)) for location in opened for step in steps]
    first, second = (
        (location.manifest(commit), location.reader(commit)) for location, commit in pairs
    )
    total_bytes = sum(map(tensor_bytes, first[0].tensors.values()))
    with progress("comparing", total_bytes, is_quiet="--json" in arguments.flags) as advance:
        comparison = compare.compare(first, second, advance)
    names = [f"{location.url} step {commit.step:,}" for location, commit in pairs]
    content = {
        "first": names[0],
        "second": names[1],
        "is_equal": comparison.is_equal,
        "equal_tensors": comparison.equal,
        "changed": [asdict(change) for change in comparison.changed],
        "recast": comparison.recast,
        "only_first": comparison.only_first,
        "only_second": comparison.only_second,
        "values": comparison.values,
    }
    return DONE if comparison.is_equal else FAILURE, content, _text(comparison, names)


def _text(comparison: Comparison, names: list[str]) -> str:
    lines = [
        f"first   {names[0]}",
        f"second  {names[1]}",
        f"equal   {pluralize(comparison.equal, 'tensor')}",
    ]
    if comparison.changed:
        rows = [["changed tensor", "dtype", "shape", "elements", "largest change", "relative"]]
        for change in comparison.changed:
            count = f"{change.changed_elements:,} of {element_count(change.shape):,}"
            shape = "×".join(map(str, change.shape)) or "()"
            sizes = [count, f"{change.largest:.3g}", f"{change.relative:.3g}"]
            rows.append([change.name, change.dtype, shape, *sizes])
        lines += ["", table(rows)]
    if comparison.recast:
        header = ["different dtype or shape", "first", "second"]
        lines += ["", table([header, *map(list, comparison.recast)])]
    for title, only in (("first", comparison.only_first), ("second", comparison.only_second)):
        if only:
            lines += ["", table([[f"only in the {title}"], *([name] for name in only)])]
    if comparison.values:
        rows = [[key, short_repr(old), short_repr(new)] for key, old, new in comparison.values]
        lines += ["", table([["value", "first", "second"], *rows])]
    if comparison.is_equal:
        lines.append("no differences")
    return "\n".join(lines)
