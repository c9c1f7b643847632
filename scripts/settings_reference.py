"""Generate docs/settings.md: every setting of a run with its default and its meaning.

python scripts/settings_reference.py > docs/settings.md
"""

from dataclasses import Field
from textwrap import fill

from trainer.config.run_help import default_text, settings
from trainer.config.schema import Run

_HEAD = """# All settings

Generated from `trainer/config/schema.py` by `python scripts/settings_reference.py`. The groups
`model`, `data`, `task`, `optimizer`, `scheduler` and `tracker` also accept the arguments of their
`_target_`: see the files in `conf/` and the docstrings.
"""


_WRAP = {
    "width": 100, "subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False
}  # fmt: skip


def reference() -> str:
    """Return the page."""
    lines, section = [_HEAD], ""
    for key, item in settings(Run):
        head = key.rpartition(".")[0]
        if head != section or len(lines) == 1:
            section = head
            lines.append(f"\n## {head or 'Run'}\n")
        lines.append(fill(f"- `{key}`, default {_default(item)}: {_meaning(item)}", **_WRAP))
    return "\n".join(lines) + "\n"


def _default(item: Field) -> str:
    text = default_text(item)
    if text in ("{}", "[]"):
        return "none"
    return f"`{text}`" if text else "from conf/config.yaml"


def _meaning(item: Field) -> str:
    rule = item.metadata
    more = []
    if rule["choices"]:
        more.append("One of " + ", ".join(f"`{choice}`" for choice in rule["choices"]) + ".")
    if rule["at_least"] is not None:
        more.append(f"At least {rule['at_least']}.")
    if rule["above"] is not None:
        more.append(f"Above {rule['above']}.")
    return " ".join([rule["doc"], *more])


if __name__ == "__main__":
    print(reference(), end="")
