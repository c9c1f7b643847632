"""The whole page: one file of HTML that needs no network and loads nothing."""

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import PackageNotFoundError, version

from trainer.core.formatting import iso
from trainer.reporting import attempts, charts, figures, samples, sections, settings
from trainer.reporting.charts import Axis, Chart
from trainer.reporting.facts import Facts
from trainer.reporting.markup import Html, joined, tag


def single(run: Facts) -> str:
    """Return the page of one run."""
    axis = figures.axis([run])
    parts = [
        ("curves", "Curves", _charts(figures.measures(run), axis, _NO_FIGURES)),
        ("pace", "Learning rate and pace", _charts(figures.machine(run), axis, _NO_FIGURES)),
        ("attempts", "Attempts", attempts.draw(run)),
        ("checkpoints", "Checkpoints", sections.checkpoints(run)),
        ("samples", "Samples", samples.draw(run)),
        ("configuration", "Configuration", settings.table(run)),
        ("system", "System", sections.system(run)),
    ]
    head = [
        tag("h1", run.name, " ", sections.pill(run)),
        tag("p", sections.since(run), " · ", tag("code", run.url), class_="since"),
        _notes(run.notes),
        sections.tiles(run),
    ]
    return _document(run.name, head, parts, run.read_s)


def several(runs: Sequence[Facts]) -> str:
    """Return the page that compares runs."""
    names = distinct(runs)
    axis = figures.axis(runs)
    parts = [
        ("results", "Results", sections.summary(runs, names)),
        ("curves", "Curves", _charts(figures.overlaid(runs, names), axis, _NO_FIGURES)),
        ("configuration", "Differences in configuration", settings.differences(runs, names)),
    ]
    title = f"{len(runs)} runs"
    notes = [f"{name}: {note}" for run, name in zip(runs, names, strict=True) for note in run.notes]
    places = joined((tag("code", run.url) for run in runs), " · ")
    head = [tag("h1", title), tag("p", places, class_="since"), _notes(notes)]
    return _document(title, head, parts, min(run.read_s for run in runs))


_NO_FIGURES = "There are no figures yet: a run writes some every trainer.log_every_steps steps."


def distinct(runs: Sequence[Facts]) -> list[str]:
    """Return the runs' names; their places, where two have the same."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    urls = [run.url for run in runs]
    if len(set(urls)) == len(urls):
        return urls
    return [f"{url} ({index})" for index, url in enumerate(urls, 1)]


def _charts(found: Sequence[Chart], axis: Axis, otherwise: str) -> Html:
    drawn = [charts.draw(chart, axis) for chart in found]
    if not any(drawn):
        return tag("p", otherwise, class_="none")
    key = None
    if axis.resumed:
        key = tag("p", tag("i", class_="key resumed"), "an attempt went on here", class_="legend")
    return joined([tag("div", *drawn, class_="charts"), key])


def _notes(notes: Sequence[str]) -> Html | None:
    if not notes:
        return None
    return tag("ul", *(tag("li", note) for note in notes), class_="notes")


def _document(
    title: str, head: Sequence[object], parts: Sequence[tuple[str, str, Html]], read_s: float
) -> str:
    style, script = _asset("page.css"), _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    links = tag("nav", *(tag("a", text, href=f"#{name}") for name, text, _ in parts))
    body = tag(
        "body",
        tag("header", *head),
        links,
        tag(
            "main",
            *(tag("section", tag("h2", text), content, id=name) for name, text, content in parts),
        ),
        tag("footer", f"Written by Perdure{_version()} from what the run's files said at "
            f"{iso(read_s).replace('T', ' ').removesuffix('+00:00')} UTC."),
        tag("div", id="tip", hidden=True),
        tag("script", Html(script)),
    )  # fmt: skip
    top = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    )
    return f"<!doctype html>\n{tag('html', top, body, lang='en')}\n"


def _asset(name: str) -> str:
    return resources.files("trainer.reporting").joinpath(name).read_text("utf-8")


def _version() -> str:
    try:
        return f" {version('perdure')}"
    except PackageNotFoundError:  # not installed
        return ""
