"""Generate docs/settings.md: every setting of a run with its default and its meaning.

python scripts/settings_reference.py > docs/settings.md
"""

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from trainer.config.schema import Run

_HEAD = """# All settings

Generated from `trainer/config/schema.py` by `python scripts/settings_reference.py`. The groups
`model`, `data`, `task`, `optimizer`, `scheduler` and `tracker` also accept the arguments of their
`_target_`: see the files in `conf/` and the docstrings.
"""


def rows(cls: type, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Yield the full key and the field of every setting of a dataclass, nested ones last."""
    for item in fields(cls):
        if not is_dataclass(item.default_factory):
            yield prefix + item.name, item
    for item in fields(cls):
        if is_dataclass(item.default_factory):
            yield from rows(item.default_factory, f"{prefix}{item.name}.")


def reference() -> str:
    """Return the page."""
    lines, section = [_HEAD], ""
    for key, item in rows(Run):
        head = key.rpartition(".")[0]
        if head != section or len(lines) == 1:
            section = head
            lines.append(f"\n## {head or 'Run'}\n\n| key | default | meaning |\n|---|---|---|")
        lines.append(f"| `{key}` | {_default(item)} | {_meaning(item)} |")
    return "\n".join(lines) + "\n"


def _default(item: Field) -> str:
    value: Any = item.default if item.default is not MISSING else item.default_factory()
    if value == "???":
        return "from conf/config.yaml"
    if value in ({}, []):
        return "none"
    if isinstance(value, bool) or value is None:
        return f"`{str(value).lower() if value is not None else 'null'}`"
    return f"`{value}`".replace("'", "")


def _meaning(item: Field) -> str:
    rule = item.metadata
    more = []
    if rule["choices"]:
        more.append("One of " + ", ".join(f"`{choice}`" for choice in rule["choices"]) + ".")
    if rule["at_least"] is not None:
        more.append(f"At least {rule['at_least']}.")
    if rule["above"] is not None:
        more.append(f"Above {rule['above']}.")
    return " ".join([rule["doc"].replace("|", "\\|"), *more])


if __name__ == "__main__":
    print(reference(), end="")
