"""The report page: one HTML file that loads nothing."""

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import PackageNotFoundError, version

from trainer.core.formatting import iso
from trainer.reporting import attempts, charts, metric_charts, samples, sections, settings
from trainer.reporting.charts import Axis, Chart
from trainer.reporting.facts import Facts
from trainer.reporting.markup import Html, joined, tag


def single(run: Facts) -> str:
    """Return the page of one run."""
    axis = metric_charts.axis([run])
    parts = [
        ("curves", "Curves", _charts(metric_charts.measures(run), axis, _NO_METRICS)),
        ("pace", "Learning rate and speed", _charts(metric_charts.machine(run), axis, _NO_METRICS)),
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


def several(runs: Sequence[Facts], note: str = "") -> str:
    """Return the page that compares runs, in this order, with a note about all of them."""
    names = distinct(runs)
    axis = metric_charts.axis(runs)
    parts = [
        ("results", "Results", sections.summary(runs, names)),
        ("curves", "Curves", _charts(metric_charts.overlaid(runs, names), axis, _NO_METRICS)),
        ("configuration", "Differences in configuration", settings.differences(runs, names)),
    ]
    title = f"{len(runs)} runs"
    notes = [note] if note else []
    notes += [
        f"{name}: {text}" for run, name in zip(runs, names, strict=True) for text in run.notes
    ]
    urls = joined((tag("code", run.url) for run in runs), " · ")
    head = [tag("h1", title), tag("p", urls, class_="since"), _notes(notes)]
    return _document(title, head, parts, min(run.read_s for run in runs))


_NO_METRICS = "No metrics yet: a run logs every trainer.log_every_steps steps."


def distinct(runs: Sequence[Facts]) -> list[str]:
    """Return the runs' names, or their URLs if names repeat."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    urls = [run.url for run in runs]
    if len(set(urls)) == len(urls):
        return urls
    return [f"{url} ({index})" for index, url in enumerate(urls, 1)]


def _charts(chart_list: Sequence[Chart], axis: Axis, otherwise: str) -> Html:
    markup = [charts.draw(chart, axis) for chart in chart_list]
    if not any(markup):
        return tag("p", otherwise, class_="none")
    key = None
    if axis.resumed:
        key = tag("p", tag("i", class_="key resumed"), "resumed here", class_="legend")
    return joined([tag("div", *markup, class_="charts"), key])


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
        tag("footer", f"Written by Perdure{_version()} from the run's files at "
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
