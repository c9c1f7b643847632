"""A report's page as a browser's parser sees it."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list["Element | str"] = field(default_factory=list)

    def all(self, tag: str, kind: str = "") -> list["Element"]:
        """Return all elements below with this tag and, where given, class."""
        matches = []
        for one in self.children:
            if isinstance(one, Element):
                if one.tag == tag and (not kind or kind in one.kinds):
                    matches.append(one)
                matches += one.all(tag, kind)
        return matches

    @property
    def kinds(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

    @property
    def text(self) -> str:
        return "".join(one if isinstance(one, str) else one.text for one in self.children)


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("document", {})]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in ("meta", "input", "img", "br"):
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def parsed(text: str) -> Element:
    """Return the page's elements; fails where tags do not match one another."""
    parser = _Parser()
    parser.feed(text)
    parser.close()
    assert len(parser.open) == 1
    return parser.open[0]


def charts(page: Element) -> dict[str, dict[str, Any]]:
    """Return what each chart's pointer reads, by the chart's title."""
    matches = {}
    for element in page.all("figure", "chart"):
        (script,) = element.all("script")
        matches[element.all("h3")[0].text] = json.loads(script.text)
    return matches


def curve(chart: dict[str, Any], name: str) -> list[tuple[int, float]]:
    """Return the points of one curve of a chart."""
    (match,) = [one for one in chart["curves"] if one["name"] == name]
    return list(zip(match["x"], match["y"], strict=True))


def tiles(page: Element) -> dict[str, str]:
    """Return the numbers at the top of the page, by label."""
    return {
        tile.all("span", "what")[0].text: tile.all("b")[0].text for tile in page.all("div", "tile")
    }
