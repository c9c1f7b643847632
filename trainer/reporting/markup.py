"""HTML markup as a type: every string that is not `Html` is escaped."""

import html
import json
from collections.abc import Iterable, Mapping
from typing import Any

_VOID = frozenset({"img", "input", "meta"})
_SELF_CLOSING = frozenset({"path"})


_MANY_ROWS = 14
"""Rows above which a table scrolls."""


class Html(str):
    """Trusted markup; every other string is external."""

    __slots__ = ()


def escaped(text: object) -> Html:
    """Return text escaped as markup."""
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def tag(name: str, /, *content: object, **attributes: object) -> Html:
    """Return an element; None and False are omitted from content and attributes.

    In attribute names a trailing `_` is dropped and others become `-`: `class_`, `aria_label`.
    """
    attribute_text = "".join(
        f" {key.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Html(f"<{name}{attribute_text}>")
    if name in _SELF_CLOSING:
        return Html(f"<{name}{attribute_text}/>")
    return Html(f"<{name}{attribute_text}>{joined(content)}</{name}>")


def joined(parts: Iterable[object], between: str = "") -> Html:
    """Concatenate parts."""
    return Html(between.join(escaped(p) for p in parts if p is not None and p is not False))


def data(values: Mapping[str, Any]) -> Html:
    """Return JSON in a script element that no text in it can close."""
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
    """Return a table in a scrolling frame; `numbers` are right-aligned columns.

    `plain` columns are not wrapped.
    """
    rows = list(rows)
    kinds = {**dict.fromkeys(plain, "plain"), **dict.fromkeys(numbers, "number")}

    def cells(kind: str, row: Iterable[object]) -> Html:
        return joined(tag(kind, cell, class_=kinds.get(i)) for i, cell in enumerate(row))

    head = tag("thead", tag("tr", cells("th", titles)))
    body = tag("tbody", *(tag("tr", cells("td", row)) for row in rows))
    frame = "scroll tall" if len(rows) > _MANY_ROWS else "scroll"
    return tag("div", tag("table", head, body, class_=class_), class_=frame)
