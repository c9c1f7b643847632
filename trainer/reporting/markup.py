"""HTML as values that cannot be forged: what is not `Html` is text, and is escaped."""

import html
import json
from collections.abc import Iterable, Mapping
from typing import Any

_VOID = frozenset({"img", "input", "meta"})
_SELF_CLOSING = frozenset({"path"})


_MANY_ROWS = 14
"""More than these scroll in their frame."""


class Html(str):
    """Markup that was made here; every other string came from outside."""

    __slots__ = ()


def escaped(text: object) -> Html:
    """Return text as markup that shows it."""
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def tag(name: str, /, *content: object, **attributes: object) -> Html:
    """Return an element; None and False are left out, of the content as of the attributes.

    A `_` at an attribute's end is dropped, and the others stand for `-`: `class_`, `aria_label`.
    """
    shown = "".join(
        f" {key.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Html(f"<{name}{shown}>")
    if name in _SELF_CLOSING:
        return Html(f"<{name}{shown}/>")
    return Html(f"<{name}{shown}>{joined(content)}</{name}>")


def joined(parts: Iterable[object], between: str = "") -> Html:
    """Return parts one after the other."""
    return Html(between.join(escaped(p) for p in parts if p is not None and p is not False))


def data(values: Mapping[str, Any]) -> Html:
    """Return JSON for a script to read, which no text in it can end early."""
    text = json.dumps(values, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json">{text}</script>')


def listing(
    titles: Iterable[str],
    rows: Iterable[Iterable[object]],
    *,
    numbers: Iterable[int] = (),
    plain: Iterable[int] = (),
    class_: str | None = None,
) -> Html:
    """Return a table in a frame that scrolls where it is too wide; `numbers` go to the right.

    `plain` are columns that are not to be broken into lines.
    """
    rows = list(rows)
    kinds = {**dict.fromkeys(plain, "plain"), **dict.fromkeys(numbers, "number")}

    def cells(kind: str, row: Iterable[object]) -> Html:
        return joined(tag(kind, cell, class_=kinds.get(i)) for i, cell in enumerate(row))

    head = tag("thead", tag("tr", cells("th", titles)))
    body = tag("tbody", *(tag("tr", cells("td", row)) for row in rows))
    frame = "scroll tall" if len(rows) > _MANY_ROWS else "scroll"
    return tag("div", tag("table", head, body, class_=class_), class_=frame)
