"""The report page: one HTML file that loads nothing, from the templates in `templates/`."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from trainer.core.formatting import iso
from trainer.reporting import attempts, charts, metric_charts, samples, sections, settings
from trainer.reporting.facts import Facts

_RUN = {
    "curves": "Curves",
    "pace": "Learning rate and speed",
    "attempts": "Attempts",
    "checkpoints": "Checkpoints",
    "samples": "Samples",
    "configuration": "Configuration",
    "system": "System",
}
"""Sections of a run's page, each with a template of its name, and their headings."""
_COMPARISON = {
    "results": "Results",
    "curves": "Curves",
    "differences": "Differences in configuration",
}


def single(run: Facts) -> str:
    """Return the page of one run."""
    axis = metric_charts.axis([run])
    return _render(
        _RUN,
        run.read_s,
        title=run.name,
        state=run.condition.state,
        since=sections.since(run),
        urls=[run.url],
        notes=run.notes,
        tiles=sections.tiles(run),
        axis=axis,
        curves=charts.drawn(metric_charts.measures(run), axis),
        pace=charts.drawn(metric_charts.machine(run), axis),
        attempts=attempts.section(run),
        checkpoints=sections.checkpoints(run),
        samples=samples.section(run),
        settings=settings.table(run),
        system=sections.system(run),
    )


def several(runs: Sequence[Facts], note: str = "") -> str:
    """Return the page that compares runs, in this order, with a note about all of them."""
    names = distinct(runs)
    axis = metric_charts.axis(runs)
    notes = [note] if note else []
    notes += [
        f"{name}: {text}" for run, name in zip(runs, names, strict=True) for text in run.notes
    ]
    return _render(
        _COMPARISON,
        min(run.read_s for run in runs),
        title=f"{len(runs)} runs",
        state="",
        since="",
        urls=[run.url for run in runs],
        notes=notes,
        tiles=[],
        names=names,
        summary=sections.summary(runs, names),
        axis=axis,
        curves=charts.drawn(metric_charts.overlaid(runs, names), axis),
        differences=settings.differences(runs),
    )


def distinct(runs: Sequence[Facts]) -> list[str]:
    """Return the runs' names, or their URLs if names repeat."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    urls = [run.url for run in runs]
    if len(set(urls)) == len(urls):
        return urls
    return [f"{url} ({index})" for index, url in enumerate(urls, 1)]


@cache
def _templates() -> Any:
    import jinja2  # torch requires it; only pages need it

    return jinja2.Environment(
        loader=jinja2.PackageLoader("trainer.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _render(parts: Mapping[str, str], read_s: float, **content: Any) -> str:
    script = _asset("uplot.js") + _asset("page.js")
    text: str = (
        _templates()
        .get_template("page.html")
        .render(
            sections=parts,
            style=_asset("uplot.css") + _asset("page.css"),
            script=script,
            script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            version=_version(),
            read_at=iso(read_s).replace("T", " ").removesuffix("+00:00"),
            **content,
        )
    )
    return text


def _asset(name: str) -> str:
    return resources.files("trainer.reporting").joinpath(name).read_text("utf-8")


def _version() -> str:
    try:
        return f" {version('perdure')}"
    except PackageNotFoundError:  # not installed
        return ""
