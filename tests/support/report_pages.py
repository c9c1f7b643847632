"""A report's page as a browser's parser sees it."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    inner: list["Element | str"] = field(default_factory=list)

    def all(self, tag: str, kind: str = "") -> list["Element"]:
        """Return all elements below with this tag and, where given, class."""
        found = []
        for one in self.inner:
            if isinstance(one, Element):
                if one.tag == tag and (not kind or kind in one.kinds):
                    found.append(one)
                found += one.all(tag, kind)
        return found

    @property
    def kinds(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

    @property
    def text(self) -> str:
        return "".join(one if isinstance(one, str) else one.text for one in self.inner)


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("document", {})]

    def handle_starttag(self, tag, attrs):
        made = Element(tag, dict(attrs))
        self.open[-1].inner.append(made)
        if tag not in ("meta", "input", "img", "br"):
            self.open.append(made)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].inner.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].inner.append(data)


def parsed(text: str) -> Element:
    """Return the page's elements; fails where tags do not match one another."""
    parser = _Parser()
    parser.feed(text)
    parser.close()
    assert len(parser.open) == 1
    return parser.open[0]


def charts(page: Element) -> dict[str, dict[str, Any]]:
    """Return what each chart's pointer reads, by the chart's title."""
    found = {}
    for figure in page.all("figure", "chart"):
        (script,) = figure.all("script")
        found[figure.all("h3")[0].text] = json.loads(script.text)
    return found


def curve(chart: dict[str, Any], name: str) -> list[tuple[int, float]]:
    """Return the points of one curve of a chart."""
    (chosen,) = [one for one in chart["curves"] if one["name"] == name]
    return list(zip(chosen["x"], chosen["y"], strict=True))


def tiles(page: Element) -> dict[str, str]:
    """Return the figures at the head of the page."""
    return {
        tile.all("span", "what")[0].text: tile.all("b")[0].text for tile in page.all("div", "tile")
    }
